SUMMARY = "A/B image with the balenapy container engine"
DESCRIPTION = "Read-only root in two slots, state and data beside them: the layout of images/arm."
HOMEPAGE = "https://github.com/balenapy/balenapy"
BUGTRACKER = "https://github.com/balenapy/balenapy/issues"
SECTION = "base"
LICENSE = "Apache-2.0"
CVE_PRODUCT = "balenapy"

inherit core-image

IMAGE_FEATURES += "read-only-rootfs"
IMAGE_INSTALL += "packagegroup-balenapy"

# The slots are of one size: an update has to fit into either.
# nooelint: oelint.vars.mispell.unknown - ours
BALENAPY_SLOT_MIB ?= "512"
# nooelint: oelint.vars.mispell - a variable of image.bbclass
IMAGE_ROOTFS_MAXSIZE = "${@int(d.getVar('BALENAPY_SLOT_MIB')) * 1024}"

IMAGE_FSTYPES = "wic.zst wic.bmap"
WKS_FILE = "balenapy-ab.wks.in"
# nooelint: oelint.vars.specific - an override of meta-raspberrypi
WKS_FILE:rpi = "balenapy-ab-rpi.wks.in"
WKS_FILE_DEPENDS += "dosfstools-native e2fsprogs-native mtools-native"
