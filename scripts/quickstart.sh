#!/usr/bin/env bash
# From nothing to a detector: sets up a virtual environment, renders the built-in data (`symbols`),
# pre-trains the nano model on it, evaluates it on unseen scenes and draws what it found.
# Everything lands in runs/quickstart/. A stopped run resumes when the script is started again.
# Arguments go to the training: ./scripts/quickstart.sh --config.train.epochs=3
case " $* " in *" --help "* | *" -h "*) # before anything is installed
  sed -n '2,5s/^# //p' "$0"
  echo "PYTHON= (interpreter) and VENV= (its environment, .venv) override. All fields: detclip train --config=pretrain.py:nano --help"
  exit ;;
esac
source "$(dirname "$0")/setup.sh"
python scripts/prepare_data.py symbols --to=data/symbols
exec python -m detclipv2_jax.main --config=configs/pretrain.py:nano --workdir=runs/quickstart "$@"
