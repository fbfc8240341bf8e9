"""Builds the compiled core, and nothing else: all metadata is in pyproject.toml.

The environment variable BUILD picks the mode:

======== ==========================================================================================
release  optimised for any machine of the platform; what a wheel holds (the default)
native   as release, for the processor that it is built on and those like it
debug    no optimisation, symbols, bounds checks and C assertions
coverage line tracing, so that `coverage` sees inside the .pyx files
sanitize AddressSanitizer and UndefinedBehaviorSanitizer; Python must run with libasan preloaded
annotate as release, with an .html beside each generated .c that shows what still talks to Python
none     nothing: for an editable install of sources that are compiled in place by themselves
======== ==========================================================================================

Generated C goes to build/<mode>/, so modes never mix and the source tree stays free of it.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# -fno-wrapv takes back the -fwrapv that Python is compiled with, which would hide every signed overflow.
COMPILE_FLAGS = {
    "release": ["-O3", "-g1"],
    "debug": ["-O0", "-g3", "-UNDEBUG"],
    "coverage": ["-O1", "-g"],
    "sanitize": ["-O1", "-g", "-UNDEBUG", "-fno-wrapv", "-fno-omit-frame-pointer", *SANITIZERS],
    "native": ["-O3", "-g1", "-march=native"],
    "annotate": ["-O3", "-g1"],
}
MODES = (*COMPILE_FLAGS, "none")
LINK_FLAGS = {"sanitize": SANITIZERS}
MACROS = {"coverage": [("CYTHON_TRACE_NOGIL", "1")]}


def directives(mode: str) -> dict[str, object]:
    """Return the Cython directives: plain C semantics, except where a mode exists to check them."""
    return {
        "language_level": "3",
        "boundscheck": mode == "debug",
        "wraparound": False,
        "cdivision": True,
        "initializedcheck": mode == "debug",
        "nonecheck": mode == "debug",
        "embedsignature": True,
        "linetrace": mode == "coverage",
    }


def extensions(mode: str) -> list[Extension]:
    """Return one extension per .pyx of the compiled core, cythonized for ``mode``."""
    found = [
        Extension(
            ".".join(path.with_suffix("").parts),
            [str(path)],
            define_macros=MACROS.get(mode, []),
            extra_compile_args=COMPILE_FLAGS[mode],
            extra_link_args=LINK_FLAGS.get(mode, []),
            depends=["setup.py"],
        )
        for path in sorted(Path("fastpath").rglob("*.pyx"))
    ]
    cythonized: list[Extension] = cythonize(
        found,
        build_dir=f"build/{mode}",
        compiler_directives=directives(mode),
        annotate=mode == "annotate",
        nthreads=os.cpu_count() or 1,
    )
    return cythonized


if __name__ == "__main__":
    mode = os.environ.get("BUILD") or "release"
    if mode not in MODES:
        raise SystemExit(f"BUILD={mode} is not one of {', '.join(MODES)}")
    setup(ext_modules=[] if mode == "none" else extensions(mode), options={"build_ext": {"parallel": os.cpu_count()}})
