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

step "4/6 which of 8 object categories was seen? linear head, 3 seeds × 3 folds"
fmrizoo finetune finetune/haxby_slice "data.store=$out/store" "init_from=$out/pretrain-slice" \
  --out "$out/frozen-pretrained" --every-fold --seeds 3 --name "swin4d pretrained, frozen"
fmrizoo finetune finetune/haxby_slice "data.store=$out/store" \
  --out "$out/frozen-random" --every-fold --seeds 3 --name "swin4d random, frozen"
fmrizoo finetune finetune/haxby_slice "data.store=$out/store" "init_from=$out/pretrain-slice" \
  head.train_encoder=all train.lr=1e-3 \
  --out "$out/tuned-pretrained" --every-fold --seeds 3 --name "swin4d pretrained, fine-tuned"
fmrizoo finetune finetune/haxby_slice "data.store=$out/store" head.train_encoder=all train.lr=1e-3 \
  --out "$out/from-scratch" --every-fold --seeds 3 --name "swin4d from scratch"

step "5/6 what they have to beat: baselines on the same folds"
fmrizoo baselines finetune/haxby_slice "data.store=$out/store" --out "$out/baselines" --every-fold

step "6/6 report"
fmrizoo report "$out" --out "$out/report.html" --title "fmrizoo demo: Haxby et al. 2001, subject 1"
