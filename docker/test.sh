#!/usr/bin/env bash
# `make docker-test`: builds both images for this machine's platform, runs compose.yaml's federation with fresh keys for
# the two rounds of run.toml, and takes everything but the images down. Ends with 2 where no container engine answers.
set -euo pipefail
cd "$(dirname "$0")"

if ! docker info >/dev/null 2>&1; then
  echo "docker-test: no container engine answers to 'docker info'; nothing was tested" >&2
  exit 2
fi

for target in server client; do
  docker build --file Dockerfile --target "$target" --tag "fedlp-$target:test" ..
done
docker image ls --filter 'reference=fedlp-*:test'

KEYS=$(mktemp -d)
export KEYS FEDLP_TAG=test PUBLISH=127.0.0.1:0 # any free port
compose=(docker compose --file compose.yaml --project-name fedlp-test)

clean_up() {
  "${compose[@]}" run -T --rm --entrypoint find keys /keys -mindepth 1 -delete # they belong to the containers' user
  "${compose[@]}" --profile keys --profile run down --volumes --remove-orphans
  rmdir "$KEYS"
}
trap clean_up EXIT
trap '"${compose[@]}" logs' ERR

"${compose[@]}" run -T --rm keys
"${compose[@]}" up --detach
"${compose[@]}" run -T --rm run
"${compose[@]}" exec -T serverapp python - <<'END'
import json
from pathlib import Path

run = Path("runs/first")
failures = json.loads((run / "manifest.json").read_text())["totals"]["failures"]
cohorts = [json.loads(line)["cohort"] for line in (run / "rounds.jsonl").read_text().splitlines()]
assert (failures, cohorts) == (0, [[0, 1, 2, 3]] * 2), (failures, cohorts)
print("docker-test: two rounds of four clients, no failures")
END
