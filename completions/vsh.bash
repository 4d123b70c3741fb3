# bash completion of vsh: its flags, and the machines that run.
eval "$(vsh --completion=bash)"
