# fish completion of vmkit: its verbs and options, the images there are, the machines that run.
vmkit completion fish | source
