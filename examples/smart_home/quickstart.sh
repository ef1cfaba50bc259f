#!/bin/sh
# The whole product in one script: tune a base, see how it was judged, read replies of base and tuned model.
#
#   sh examples/smart_home/quickstart.sh [RUN]     RUN: a new run folder
#
# BIN names the folder of the `luthier` command; without it, the one on PATH is used. `make quickstart` calls this.
set -eu

luthier() {
    "${BIN:+$BIN/}luthier" "$@"
}

run=${1:-}
if [ -z "$run" ]; then
    # A finished run is never overwritten: the next one goes to the next free folder.
    run=runs/quickstart
    n=1
    while [ -e "$run" ]; do
        n=$((n + 1))
        run=runs/quickstart-$n
    done
fi

luthier train examples/smart_home/recipe.yaml --set output="$run"

echo
echo "Some requests that are not in the data, answered by the base and by the tuned model:"
echo
luthier chat "$run" --base --max-new-tokens 64 \
    --ask "it's freezing in the office, make it 22 degrees" \
    --ask "lights off in the hallway and lock the back door" \
    --ask "what is the meaning of life?"

echo "Read on:     $run/report.html"
echo "Chat:        ${BIN:+$BIN/}luthier chat $run          (/base shows the base's reply beside)"
echo "Your data:   ${BIN:+$BIN/}luthier init"
