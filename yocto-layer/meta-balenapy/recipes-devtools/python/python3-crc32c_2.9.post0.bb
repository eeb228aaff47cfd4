# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "A python package implementing the crc32c algorithm in hardware and"
DESCRIPTION = "A python package implementing the crc32c algorithm in hardware and. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/crc32c/"
BUGTRACKER = "https://pypi.org/project/crc32c/"
SECTION = "devel/python"
CVE_PRODUCT = "crc32c"
LICENSE = "LGPL-2.1-or-later"
LIC_FILES_CHKSUM = "\
    file://LICENSE;md5=4fbd65380cdd255951079008b364516c \
    file://LICENSE.google-crc32c;md5=e9ed01b5e5ac9eae23fc2bb33701220c \
    file://LICENSE.slice-by-8;md5=6b3bc7709d6b2db6646ec2467310ff6b \
"

SRC_URI[sha256sum] = "6a089e0340de8438e836a09e613c6b541675d0f3aa92b3fe34295aaba62f014f"

PYPI_PACKAGE = "crc32c"

inherit pypi python_setuptools_build_meta

RDEPENDS:${PN} += "\
    python3-core \
"

BBCLASSEXTEND = "native nativesdk"
