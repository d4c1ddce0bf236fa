"""Chain-of-thought decoding: `CoT.from_model(model).predict(rows, max_new_tokens=128)`."""

from dhrd_lib.cot.decoding import CoT, CoTPredictions, Decoding, Generations
