#!/bin/sh
# Build the wheel, install it into a new environment without torch, and answer a question
# from another directory. Usage: PYTHON=python3.12 smoke_wheel.sh BUILDER_PYTHON
set -eu
builder=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$builder" -m build --wheel --outdir "$scratch/dist" . > "$scratch/build.log" 2>&1 || { cat "$scratch/build.log"; exit 1; }
wheel=$(ls "$scratch"/dist/*.whl)
others=$("$builder" -m zipfile -l "$wheel" | awk 'NR > 1 {print $1}' | grep -vE '^(jaxprune/|jaxprune-[^/]*\.dist-info/)' || true)
[ -z "$others" ] || { echo "The wheel holds more than jaxprune/: $others"; exit 1; }

"${PYTHON:-python3}" -m venv "$scratch/env"
"$scratch/env/bin/python" -m pip install -q "$wheel"
cd "$scratch"
"$scratch/env/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is not None)' \
  || { echo "torch came along"; exit 1; }
image=$("$scratch/env/bin/python" -c 'import jaxprune; print(jaxprune.DEMO_IMAGE)')
for method in none prumerge prumerge_plus; do
  answer=$("$scratch/env/bin/jaxprune" generate --image "$image" --prompt "How many objects are there?" --method "$method")
  [ -n "$answer" ] || { echo "no answer with $method"; exit 1; }
  echo "wheel, $("$scratch/env/bin/python" --version), $method: $answer"
done
