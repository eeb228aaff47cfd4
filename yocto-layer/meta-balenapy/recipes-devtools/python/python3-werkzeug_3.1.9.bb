# Generated from .ci/constraints.txt by yocto-layer/generate: do not edit.
SUMMARY = "The comprehensive WSGI web application library"
DESCRIPTION = "The comprehensive WSGI web application library. In the version that the engine is tested with."
HOMEPAGE = "https://pypi.org/project/werkzeug/"
BUGTRACKER = "https://pypi.org/project/werkzeug/"
SECTION = "devel/python"
CVE_PRODUCT = "werkzeug"
LICENSE = "BSD-3-Clause"
LIC_FILES_CHKSUM = "file://LICENSE.txt;md5=5dc88300786f1c214c1e9827a5229462"

SRC_URI[sha256sum] = "55ca7c70a75689be937aa27f8ff4b018f06ff4838fc73045560bf0f5a1291060"

PYPI_PACKAGE = "werkzeug"

inherit pypi python_flit_core

do_configure:prepend() {
    sed -i -e 's/^license *= *\("[^"]*"\)/license = {text = \1}/' -e '/^license-files *=/d' \
        ${S}/pyproject.toml
}

RDEPENDS:${PN} += "\
    python3-datetime \
    python3-io \
    python3-json \
    python3-logging \
    python3-markupsafe \
    python3-netclient \
"

BBCLASSEXTEND = "native nativesdk"
