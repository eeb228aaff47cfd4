#!/bin/sh
echo backed up > "$BACKUP_DIR/$(id -un)"
