#!/usr/bin/env bash
# Runs the CPU image: `flamingo --help`, then the demo page with a tiny model until its health check is good.
#
#     .github/release/check-image.sh IMAGE
set -euo pipefail
image=$1
cd "$(dirname "$0")/../.."

docker run --rm "$image" --help
model=$(mktemp -d)
chmod 777 "$model" # the image's user has another number
docker run --rm --entrypoint python --volume "$PWD/tests:/checks/tests:ro" --volume "$model:/model" --workdir /checks \
    "$image" -c "from pathlib import Path; from tests.eval.harness_model import write_model; write_model(Path('/model'))"
docker run --detach --name page --volume "$model:/model:ro" "$image" demo /model --host 0.0.0.0
trap 'docker logs page; docker rm --force page > /dev/null' EXIT
for _ in $(seq 60); do
    state=$(docker inspect --format '{{.State.Health.Status}}' page)
    [ "$state" = healthy ] && exit 0
    sleep 5
done
echo "the page is $state after five minutes" >&2
exit 1
