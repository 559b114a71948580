#!/usr/bin/env bash
# Unconditional, by class and by caption: three runs of one network on the handwritten digits, and what they sample.
# From the repository's root: bash results/conditional-digits/commands.sh
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
runs=runs/conditional-digits
here=results/conditional-digits
same="--network dit --process vp-cosine --prediction v --steps 3000 --evaluate-every 1000 --sample-every 0"
words=(zero one two three four five six seven eight nine)

$python -m training run digits $same --out $runs/unconditional
$python -m training run digits --conditional $same --out $runs/class
$python -m training run captioned-digits --text-encoder tiny $same --out $runs/text

$python -m training evaluate $runs/unconditional digits
$python -m training evaluate $runs/class digits --guidance 2
$python -m training evaluate $runs/text captioned-digits --guidance 2

$python -m training sample $runs/unconditional --count 100 -o $runs/unconditional.npz
$python -m training sample $runs/class --count 100 --guidance 2 -o $runs/class.npz
$python -m training sample $runs/text --count 100 --guidance 2 --prompt "${words[@]/#/a handwritten }" -o $runs/text.npz

for name in unconditional class text; do
    cp $runs/$name.png $here/$name.png
    cp $runs/$name/evaluation.json $here/$name.json
done
cp $runs/class/condition.csv $here/class.csv
cp $runs/text/condition.csv $here/text.csv
