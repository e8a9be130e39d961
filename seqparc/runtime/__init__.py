"""Running a plan: the driver, the torch backend, autograd, and the module the user holds."""
