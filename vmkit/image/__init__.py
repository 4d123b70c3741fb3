"""vmkit.image: a recipe (TOML) and templates become a kernel, an initramfs and a manifest."""
