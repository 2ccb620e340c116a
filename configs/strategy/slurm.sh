#!/bin/bash
# A run on a SLURM cluster: sbatch configs/strategy/slurm.sh --config RUN.yaml --config configs/strategy/fsdp.yaml
# When its time is nearly up or it is preempted, the run saves, is queued again and resumes where it stopped.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
run=runs/slurm/$SLURM_JOB_ID
if [ -e "$run/checkpoints/last.ckpt" ]; then
  words=(--run_dir "$run" --ckpt_path last)
else
  words=("$@" --run_dir "$run" --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE")
fi
srun --kill-on-bad-exit=0 --wait=120 lit-llm fit "${words[@]}"
code=$?
# 130: interrupted and saved. --kill-on-bad-exit=0: no process is killed while saving because another has exited.
if [ "$code" = 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
