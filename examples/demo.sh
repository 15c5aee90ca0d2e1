#!/bin/sh
# The main job on the shipped real data: prepare → pretrain → fine-tune → report.
#   sh examples/demo.sh FOLDER        (about four minutes on two cores)
set -eu
out=${1:-demo}
mkdir -p "$out"
step() { printf '\n%s\n' "── $1"; }

# Models this small keep one core busy: two commands side by side take half the time on two cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
done_or_log() {  # PROCESS LOG
  wait "$1" || { cat "$2" >&2; exit 1; }
}

step "1/6 prepare: 18 runs of Haxby et al. 2001 (BIDS) → one checksummed HDF5 file"
fmrizoo prepare sample:haxby2001 "$out/store" prepare.space=native

step "2/6 pretrain: every backbone × every objective on the whole brain"
step "3/6 and, beside it, on one slice at native resolution per fold: test runs are never seen"
(
  fmrizoo -q pretrain pretrain/haxby_slice "data.store=$out/store" --out "$out/pretrain-slice" \
    --every-fold
) 2>"$out/pretrain-slice.log" &
slice=$!
fmrizoo pretrain "pretrain/haxby_*_*" "data.store=$out/store" --out "$out/pairs"
fmrizoo analyze autocorrelation "$out"/pairs/*
done_or_log $slice "$out/pretrain-slice.log"

step "4/6 which of 8 object categories was seen? every way to fine-tune, 3 seeds × 3 folds"
tune() {  # FOLDER RECIPE ROW [key=value …]
  folder=$1 recipe=$2 row=$3
  shift 3
  fmrizoo -q finetune "finetune/$recipe" "data.store=$out/store" "$@" \
    --out "$out/$folder" --every-fold --seeds 3 --name "swin4d $row"
}
pretrained="init_from=$out/pretrain-slice"
(
  tune frozen-pretrained haxby_slice "pretrained, frozen" "$pretrained" train.cache_features=true
  tune frozen-random haxby_slice "random, frozen" train.cache_features=true
  tune complex haxby_slice_complex "pretrained, complex head" "$pretrained"
  tune prompt haxby_slice_prompt "pretrained, prompts" "$pretrained"
  tune last-block haxby_slice_last_block "pretrained, last two layers" "$pretrained"
) 2>"$out/finetune-1.log" &
first=$!
(
  tune lora haxby_slice_lora "pretrained, LoRA" "$pretrained"
  tune tuned-pretrained haxby_slice "pretrained, fine-tuned" "$pretrained" \
    head.train_encoder=all train.lr=1e-3
  tune from-scratch haxby_slice "from scratch" head.train_encoder=all train.lr=1e-3
) 2>"$out/finetune-2.log" &
second=$!
done_or_log $first "$out/finetune-1.log"
done_or_log $second "$out/finetune-2.log"

step "5/6 what they have to beat: baselines on the same folds"
fmrizoo baselines finetune/haxby_slice "data.store=$out/store" --out "$out/baselines" --every-fold

step "6/6 report"
fmrizoo report "$out" --out "$out/report.html" --title "fmrizoo demo: Haxby et al. 2001, subject 1"
