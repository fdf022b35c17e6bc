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

if [ $# -gt 0 ]; then
    sites=("$1"/lib/python3*/site-packages)
    exec "$audit" --strict --path "${sites[0]}" ${waived[@]+"${waived[@]}"}
fi
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
for lock in "$here"/../../docker/locks/*.txt; do
    echo "${lock##*/}"
    # Of a build such as 2.14.1+cpu the services know the version alone.
    grep -oE '^[A-Za-z0-9._-]+==[^ ;+]+' "$lock" > "$pins"
    "$audit" --strict --no-deps --disable-pip -r "$pins" ${waived[@]+"${waived[@]}"}
done
