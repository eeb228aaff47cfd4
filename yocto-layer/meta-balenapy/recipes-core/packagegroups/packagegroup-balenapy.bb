SUMMARY = "The container engine and the system around it"
DESCRIPTION = "What an image wants beside the engine: time before TLS, compressed swap, a network, a shell."
HOMEPAGE = "https://github.com/balenapy/balenapy"
BUGTRACKER = "https://github.com/balenapy/balenapy/issues"
SECTION = "base"

inherit packagegroup

RDEPENDS:${PN} = "\
    balenapy \
    ca-certificates \
    e2fsprogs-e2fsck \
    e2fsprogs-resize2fs \
    kernel-modules \
    tini \
    util-linux-sfdisk \
"
