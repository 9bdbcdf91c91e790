# What makes this folder. 01, 02 and 04a ran as they stand here, 02 and 04a on one H100 by the code of commit 69c99235b635 (`bash experiments/gpu.sh imdb`).
# 03 and 04b are missing: 03's training became NaN there (results/README.md, section 8). 04a was ended by --max-hours in its
# control's third epoch, and the same command continued.
shared="--dataset reviews --output-dir outputs --seed 42 --precision auto --validation-samples 2500"
python 01_baseline.py --dataset reviews --output-dir outputs  # elsewhere, by commit 1badc53aa10a
python 02_finetune_roberta.py $shared --roberta-model mpnet-base --max-train-samples all --max-transfer-samples all \
    --max-length 512 --epochs 2 --learning-rate 4e-5 --batch-size 64 --micro-batch-size 32 --batch-tokens 32768 \
    --weight-decay 0.01 --warmup-fraction 0.06 --student-layers 6
python 04a_distill_from_roberta.py $shared --student-model minilm-l6 --max-train-samples all --max-transfer-samples all \
    --max-length 512 --epochs 2 --learning-rate 2e-4 --batch-size 128 --micro-batch-size 128 --weight-decay 0.01 \
    --warmup-fraction 0.06 --soft-labels all --soft-loss kl --alpha 0.9 --temperature 2 --feature-weight 0.1 --control
# 05 reads the same 10,000 test reviews by this flag and gives the same columns. It was not run as one command: the teacher
# and the baselines were scored by 05 on the H100, the students by 05's functions on two CPU cores, where all times are from.
python 05_benchmark.py --dataset reviews --output-dir outputs --seed 42 --precision fp32 --max-test-samples 10000
# Validation in predictions.parquet: the teacher's log-odds are those that 02 saved, the students' were scored on two CPU cores
# from the weights of 04a, as 04a does it since. cascade.csv is made of them: python experiments/tables.py results/imdb
