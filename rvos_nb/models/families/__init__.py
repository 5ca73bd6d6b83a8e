"Facts of the families of models, a YAML file each."
