"""Pure kernels: Hessians, inverses, elimination, OBS, Newton steps."""
