#!/usr/bin/env bash
# From captioned photos to a caption, in a few minutes on a CPU: trains a small captioner, scores it, exports it, runs it.
#
#   examples/train_export_run.sh DATA OUT PHOTO...
#
# DATA is Flickr8k's folder, OUT a folder for everything that is made, PHOTO what is captioned in the end. It shows the
# way, not how far it leads: the extractor stays random, and of a few hundred photos nothing much can be learned.
# After a stop the same command goes on. Needs the extra `export`.
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: ${0##*/} DATA OUT PHOTO..." >&2
  exit 2
fi
data=$1 out=$2
shift 2

caption-train train "$data" "$out/run" --limit 300 --until training --config "$(dirname "$0")/tiny.toml"
caption-train evaluate "$data" "$out/run" --show 3 --no-java
caption-export "$out/run" "$out/bundle" --photos "$(dirname "$1")" --overwrite
caption-rt --model "$out/bundle" --self-test
caption-rt --model "$out/bundle" "$@"
