# fish completion of vsh: its flags, and the machines that run.
vsh --completion=fish | source
