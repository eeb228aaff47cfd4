# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "binary diff and patch using the BSDIFF4-format"
DESCRIPTION = "binary diff and patch using the BSDIFF4-format. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/bsdiff4/"
BUGTRACKER = "https://pypi.org/project/bsdiff4/"
SECTION = "devel/python"
CVE_PRODUCT = "bsdiff4"
LICENSE = "BSD-3-Clause"
LIC_FILES_CHKSUM = "file://LICENSE;md5=a2321ebf3d51a8e3b0010d032d40cd22"

SRC_URI[sha256sum] = "ed262caa697247e9af00af1076b5fce0b578a17b19d9bdbad30c110dd7660a8d"

PYPI_PACKAGE = "bsdiff4"

inherit pypi python_setuptools_build_meta

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
