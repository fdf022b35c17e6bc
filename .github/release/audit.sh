#!/usr/bin/env bash
# Known vulnerabilities in the locked sets of the images, or in an environment.
#
#     .github/release/audit.sh [ENVIRONMENT]
#
# TOOLS: folder of pip-audit; default: that of PATH. A vulnerability that does not concern us has a line in
# waivers.txt: its identifier, then #, then why, and until when.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
audit=${TOOLS:+$TOOLS/}pip-audit

waived=()
while read -r id _; do
    case $id in "" | \#*) ;; *) waived+=(--ignore-vuln "$id") ;; esac
done < "$here/waivers.txt"

pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
ask() {
    # Of a build such as 2.14.1+cpu the services know the version alone.
    grep -oE '^[A-Za-z0-9._-]+==[^ ;+]+' > "$pins"
    "$audit" --strict --no-deps --disable-pip -r "$pins" ${waived[@]+"${waived[@]}"}
}
if [ $# -gt 0 ]; then
    # Without what is released: no service knows a version that nobody has yet.
    "$1/bin/python" -m pip freeze --all --exclude flamingo-vlm | ask
    exit
fi
for lock in "$here"/../../docker/locks/*.txt; do
    echo "${lock##*/}"
    ask < "$lock"
done
