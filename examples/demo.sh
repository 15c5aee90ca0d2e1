#!/bin/sh
# The main job on the shipped real data: prepare → pretrain → fine-tune → report.
#   sh examples/demo.sh FOLDER        (about four minutes on two cores)
set -eu
out=${1:-demo}
mkdir -p "$out"
step() { printf '\n%s\n' "── $1"; }

step "1/6 prepare: 18 runs of Haxby et al. 2001 (BIDS) → one checksummed HDF5 file"
fmrizoo prepare sample:haxby2001 "$out/store" prepare.space=native

step "2/6 pretrain: every backbone × every objective on the whole brain"
fmrizoo pretrain "pretrain/haxby_*_*" "data.store=$out/store" --out "$out/pairs"
fmrizoo analyze autocorrelation "$out"/pairs/*

step "3/6 pretrain on one slice at native resolution, once per fold: test runs are never seen"
fmrizoo pretrain pretrain/haxby_slice "data.store=$out/store" --out "$out/pretrain-slice" --every-fold

step "4/6 which of 8 object categories was seen? every way to fine-tune, 3 seeds × 3 folds"
tune() {  # NAME-OF-FOLDER RECIPE ROW-NAME [key=value …]
  folder=$1 recipe=$2 row=$3
  shift 3
  fmrizoo finetune "finetune/$recipe" "data.store=$out/store" "$@" \
    --out "$out/$folder" --every-fold --seeds 3 --name "$row"
}
pretrained="init_from=$out/pretrain-slice"
tune frozen-pretrained haxby_slice "swin4d pretrained, frozen" "$pretrained" train.cache_features=true
tune frozen-random haxby_slice "swin4d random, frozen" train.cache_features=true
tune complex haxby_slice_complex "swin4d pretrained, complex head" "$pretrained"
tune prompt haxby_slice_prompt "swin4d pretrained, prompts" "$pretrained"
tune lora haxby_slice_lora "swin4d pretrained, LoRA" "$pretrained"
tune last-block haxby_slice_last_block "swin4d pretrained, last two layers" "$pretrained"
tune tuned-pretrained haxby_slice "swin4d pretrained, fine-tuned" "$pretrained" \
  head.train_encoder=all train.lr=1e-3
tune from-scratch haxby_slice "swin4d from scratch" head.train_encoder=all train.lr=1e-3

step "5/6 what they have to beat: baselines on the same folds"
fmrizoo baselines finetune/haxby_slice "data.store=$out/store" --out "$out/baselines" --every-fold

step "6/6 report"
fmrizoo report "$out" --out "$out/report.html" --title "fmrizoo demo: Haxby et al. 2001, subject 1"
