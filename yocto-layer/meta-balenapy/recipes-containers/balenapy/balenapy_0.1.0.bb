# nooelint: oelint.var.bbclassextend - a service of the device
SUMMARY = "Fleet container engine: Docker Engine API v1.39 in Python on Trio"
DESCRIPTION = "\
    A container engine for fleets of small devices: balena-engine's job done anew. Pulls are staged, \
    verified and committed in one transaction, containers outlive the daemon, and logs never grow.\
"
HOMEPAGE = "https://github.com/balenapy/balenapy"
BUGTRACKER = "https://github.com/balenapy/balenapy/issues"
SECTION = "containers"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://LICENSE;md5=3b83ef96387f14655fc854ddc3c6bd57"

CVE_PRODUCT = "balenapy"

# Sources and units are those of the tree that the layer lies in; its units serve the images of images/arm as well.
# nooelint: oelint.vars.fileextrapaths,oelint.vars.outofcontext - the layer lies in the tree it builds
FILESEXTRAPATHS:prepend := "${BALENAPY_TREE}:"
SRC_URI = "\
    file://setup.cfg;subdir=source \
    file://pyproject.toml;subdir=source \
    file://README.md;subdir=source \
    file://LICENSE;subdir=source \
    file://balenapy;subdir=source \
    file://delta;subdir=source \
    file://images/systemd;subdir=source \
"

S = "${WORKDIR}/source"

inherit python_setuptools_build_meta systemd useradd features_check

REQUIRED_DISTRO_FEATURES = "systemd"

SYSTEMD_SERVICE:${PN} = "balena-engine.socket balena-engine.service"

USERADD_PACKAGES = "${PN}"
GROUPADD_PARAM:${PN} = "--system balena-engine"

do_install:append() {
    install -d ${D}${systemd_system_unitdir} ${D}${libdir}/sysusers.d ${D}${nonarch_libdir}/tmpfiles.d
    install -m 0644 ${S}/images/systemd/balena-engine.service ${D}${systemd_system_unitdir}/
    install -m 0644 ${S}/images/systemd/balena-engine.socket ${D}${systemd_system_unitdir}/
    install -m 0644 ${S}/images/systemd/balenapy.sysusers ${D}${libdir}/sysusers.d/balenapy.conf
    install -m 0644 ${S}/images/systemd/balenapy.tmpfiles ${D}${nonarch_libdir}/tmpfiles.d/balenapy.conf
    # Compiled once, here, and not checked on the device: a start on a slow board is mostly imports.
    ${PYTHON} -m compileall -q -f --invalidation-mode unchecked-hash -s ${D} -p / ${D}${PYTHON_SITEPACKAGES_DIR}
}

FILES:${PN} += "${libdir}/sysusers.d ${nonarch_libdir}/tmpfiles.d ${systemd_system_unitdir}"

require python-packages.inc

# crun, or runc-opencontainers: set it in the distribution.
BALENAPY_OCI_RUNTIME ?= "crun"

RDEPENDS:${PN} += "${BALENAPY_OCI_RUNTIME} ${BALENAPY_PYTHON_PACKAGES}"

# conmon holds containers while the engine restarts.
RDEPENDS:${PN} += "\
    ca-certificates \
    conmon \
    iproute2 \
    nftables \
    python3-compression \
    python3-core \
    python3-ctypes \
    python3-datetime \
    python3-difflib \
    python3-fcntl \
    python3-io \
    python3-json \
    python3-logging \
    python3-math \
    python3-multiprocessing \
    python3-netclient \
    python3-numbers \
    python3-profile \
    python3-resource \
    python3-shell \
    python3-sqlite3 \
    python3-stringold \
    python3-terminal \
    python3-threading \
    python3-unixadmin \
"

RRECOMMENDS:${PN} += "\
    kernel-module-bridge \
    kernel-module-nf-conntrack \
    kernel-module-nf-nat \
    kernel-module-nf-tables \
    kernel-module-nft-chain-nat \
    kernel-module-nft-ct \
    kernel-module-nft-masq \
    kernel-module-nft-nat \
    kernel-module-overlay \
    kernel-module-veth \
    tini \
"
