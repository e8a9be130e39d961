"""Code generation: from a lane program to C, compiled and cached."""

if __name__ != "seqparc.codegen":
    raise ImportError("this package is seqparc.codegen; import it under that name")
