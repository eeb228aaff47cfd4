# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "A simple framework for building complex web applications"
DESCRIPTION = "A simple framework for building complex web applications. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/flask/"
BUGTRACKER = "https://pypi.org/project/flask/"
SECTION = "devel/python"
CVE_PRODUCT = "flask"
LICENSE = "BSD-3-Clause"
LIC_FILES_CHKSUM = "file://LICENSE.txt;md5=ffeffa59c90c9c4a033c7574f8f3fb75"

SRC_URI[sha256sum] = "0ef0e52b8a9cd932855379197dd8f94047b359ca0a78695144304cb45f87c9eb"

PYPI_PACKAGE = "flask"

inherit pypi python_flit_core

do_configure:prepend() {
    sed -i -e 's/^license *= *\("[^"]*"\)/license = {text = \1}/' -e '/^license-files *=/d' \
        ${S}/pyproject.toml
}

RDEPENDS:${PN} += "\
    python3-blinker \
    python3-click \
    python3-io \
    python3-itsdangerous \
    python3-jinja2 \
    python3-json \
    python3-logging \
    python3-markupsafe \
    python3-netclient \
    python3-werkzeug \
"

BBCLASSEXTEND = "native nativesdk"
