# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "A minimal low-level HTTP client"
DESCRIPTION = "A minimal low-level HTTP client. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/httpcore/"
BUGTRACKER = "https://pypi.org/project/httpcore/"
SECTION = "devel/python"
CVE_PRODUCT = "httpcore"
LICENSE = "BSD-3-Clause"
LIC_FILES_CHKSUM = "file://LICENSE.md;md5=1c1f23b073da202e1f4f9e426490210c"

SRC_URI[sha256sum] = "6e34463af53fd2ab5d807f399a9b45ea31c3dfa2276f15a2c3f00afff6e176e8"

PYPI_PACKAGE = "httpcore"

inherit pypi python_pep517 python3native python3-dir setuptools3-base

DEPENDS += "python3-hatch-fancy-pypi-readme-native python3-hatchling-native"

RDEPENDS:${PN} += "\
    python3-certifi \
    python3-h11 \
    python3-io \
    python3-netclient \
"

BBCLASSEXTEND = "native nativesdk"
