"""What the ops' Triton kernels share: functions that run on the device, launches that several ops make, tile sizes.

    primitives        blocks, masks and norms inside a kernel; memory and block sizes before a launch
    margins           psi and its slope on the device
    gathers           rows of a table by index
    rows              kernels that take a row a program: unit rows, norms, gradients back through a norm
    rounding          stochastic rounding, with the random numbers of the other implementations
    reduction         a loss a row to a mean or a sum, and the factor that a mean leaves for the backward pass
    cosine_gradients  gradients of rows and centres from the slopes of their cosines
    tuning            tile sizes by kernel, architecture and dtype
    shipped           what the kernels of this folder are compiled with ahead of time
    races             a race that Triton compiles into some loops, found in the compiler's output

`tuning` and `races` do without Triton, so that every machine can import them; the others need it.
"""
