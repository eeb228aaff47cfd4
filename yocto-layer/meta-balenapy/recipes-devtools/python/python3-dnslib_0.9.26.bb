# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "Simple library to encode/decode DNS wire-format packets"
DESCRIPTION = "Simple library to encode/decode DNS wire-format packets. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/dnslib/"
BUGTRACKER = "https://pypi.org/project/dnslib/"
SECTION = "devel/python"
CVE_PRODUCT = "dnslib"
LICENSE = "BSD-3-Clause"
LIC_FILES_CHKSUM = "file://LICENSE;md5=8d24d8757f793508dc751f2037c49333"

SRC_URI[sha256sum] = "be56857534390b2fbd02935270019bacc5e6b411d156cb3921ac55a7fb51f1a8"

PYPI_PACKAGE = "dnslib"

inherit pypi python_setuptools_build_meta

RDEPENDS:${PN} += "\
    python3-io \
    python3-netclient \
    python3-threading \
"

BBCLASSEXTEND = "native nativesdk"
