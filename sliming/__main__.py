"""`python -m sliming`: what there is to run."""

import sliming

print(f"""sliming {sliming.__version__}: SliME, the model of "Beyond LLaVA-HD"

  torchrun train.py --stage all     the tiny preset in three stages (minutes on a laptop, offline)
  torchrun train.py --stage 1       one stage; then 2 and 3. --help lists the flags
  python sample.py --image FILE --prompt "..."    ask the newest checkpoint; --explain page.html
  python -m sliming.tour            one image and one question through the model, step by step
  python -m sliming.tiny            a built-in picture to ask about; the stand-ins made again
  python -m sliming.evaluation      held-out questions, your own records, the paper's benchmarks
  python -m sliming.checkpoints     merge LoRA adapters; write under the released models' names
  python -m sliming.demo            upload an image, ask, see what the model looked at
  python -m sliming.smr             build the SMR training data from its sources, and look at it
  python -m sliming.bench           speed and memory beside named alternatives

train.py, sample.py and theory/ are in the repository's top folder; the modules run anywhere.""")
