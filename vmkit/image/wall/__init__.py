"""vmkit.image.wall: the layers that keep a guest's processes away from vshd."""
