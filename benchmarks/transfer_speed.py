"""Tokens per second of attention transfer on SmolLM2: the `torch` path against `implementation="naive"`.

    python benchmarks/transfer_speed.py --model models/smollm2-135m-instruct

A step is one sequence: forward with the teacher's attention, loss and backward of all layers, and AdamW. Both paths
run on the same weights and tokens, in turns.
"""

from common import alternate, find_data, find_model, parser_of, set_threads, write_result

LENGTHS = (512, 2_048)
WINDOW = 64
TEXT = "train/wikipedia_paragraphs.jsonl.gz"


def main() -> None:
    """Measure both paths at each length."""
    parser = parser_of(__doc__, model="smollm2-135m-instruct")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    arguments = parser.parse_args()
    set_threads(arguments.threads)
    folder, text = find_model(arguments.model), find_data(TEXT)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from attnconv.convert import convert_model
    from attnconv.distill.batches import Batch
    from attnconv.distill.trainee import Trainee
    from attnconv.distill.transfer import AttentionTransfer
    from attnconv.evaluate import load_tokens
    from attnconv.recipes.stages.attention_transfer import AttentionTransferStage

    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = convert_model(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), "lolcats", window=WINDOW)
    trainee = Trainee(model)
    stage = AttentionTransferStage(
        kind="attention_transfer", steps=1, sequence_length=512, learning_rate=1e-2, precision=arguments.precision
    )
    transfer = AttentionTransfer(trainee, stage)
    parameters = [parameter for group in transfer.parameter_groups() for parameter in group.parameters.values()]
    trainee.train_only(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate)

    def step(implementation: str, batch: Batch) -> None:
        for core in trainee.cores().values():
            core.implementation = implementation
        transfer.backward(batch, batch.num_tokens)
        optimizer.step()
        optimizer.zero_grad()

    def teacher(batch: Batch) -> None:
        with torch.no_grad(), trainee.as_teacher():
            model.model(batch.input_ids, use_cache=False)

    rows = []
    for length in LENGTHS:
        ids = load_tokens(text, tokenizer, context=length, limit=length)[None]
        batch = Batch(ids)
        cases = {
            "torch": lambda batch=batch: step("torch", batch),
            "naive": lambda batch=batch: step("naive", batch),
            "teacher_forward": lambda batch=batch: teacher(batch),
        }
        seconds = alternate(cases, repeats=arguments.repeats)
        rows.append(
            {
                "length": length,
                "tokens_per_second": {name: length / value for name, value in seconds.items()},
                "speedup": seconds["naive"] / seconds["torch"],
            }
        )
        print(rows[-1])
    write_result(
        "transfer_speed",
        settings={
            "model": folder.name,
            "precision": arguments.precision,
            "window": WINDOW,
            "batch_size": 1,
            "repeats": arguments.repeats,
        },
        results={"lengths": rows},
        label=arguments.label,
    )


if __name__ == "__main__":
    main()
