"""What the help pages of verbs say beside their keys."""

from __future__ import annotations

EXAMPLES = {
    "train": (
        "visiontrain train",
        "visiontrain train data=my/data.yaml epochs=100 imgsz=640 batch=16",
        "visiontrain train data=my/data.yaml strategy=ddp strategy.processes=2",
        "visiontrain train out=runs/detect/train resume=true",
    ),
    "val": ("visiontrain val weights=runs/detect/train data=my/data.yaml split=test",),
    "predict": (
        "visiontrain predict weights=runs/detect/train source=pictures/",
        "visiontrain predict weights=runs/detect/train source=pictures/ strategy=ddp",
    ),
    "check": (
        "visiontrain check data=my/data.yaml",
        "visiontrain check data=my/data.yaml imgsz=640 out=checked",
        "visiontrain check data=my/data.yaml --json",
    ),
    "data": (
        "visiontrain data shard data=my/data.yaml out=shards",
        "visiontrain data shard data=my/pictures out=shards split=train,val shard_size=512",
        "visiontrain train data=shards",
    ),
    "parity": (
        "visiontrain parity data=tiny epochs=5 strategy=ddp model.norm=group imgsz=64 batch=4",
    ),
    "plan": (
        "visiontrain plan data=my/data.yaml model=yolo_m batch=32 devices=4 memory=16",
        "visiontrain plan data=digits devices=2 strategy=pipeline strategy.schedule=1f1b --json",
    ),
    "federated": (
        "visiontrain federated cert hosts=fed.example.org",
        "visiontrain federated key key=clinic.key",
        "visiontrain federated register key=clinic.key.pub",
        "visiontrain federated server data=my/data.yaml strategy.serve=0.0.0.0:9092 "
        "strategy.clients=3",
        "visiontrain federated client server=fed.example.org:9092 key=clinic.key data=ours.yaml",
    ),
    "compare": (
        "visiontrain compare data=digits strategies=single,ddp,fsdp,pipeline epochs=3",
        "visiontrain compare data=my/data.yaml strategies=single,ddp,ddp:sync_every=8+outer=diloco",
        "visiontrain compare data=my/data.yaml strategies=single,federated:clients=8 seeds=0,1,2",
        "visiontrain compare compare/digits",
        "visiontrain compare out=runs/detect/compare resume=true",
    ),
}
NOTES = {
    "val": "What is not typed of data, task, precision, batch, imgsz and project is as the run\n"
    "was trained.",
    "check": "Ends with 3 when no run would start on it, or a split cannot be read; with 0 when\n"
    "there are warnings only.",
    "data": "Writes every split as tars in WebDataset's layout, an index of where images lie,\n"
    "and a data.yaml, into a new folder. Nothing is left there when it is stopped.",
    "parity": "Compares 20 optimizer steps; ends with 0 when the mode is exact, with 1 otherwise.",
    "federated": "Who runs the server: cert, then register for each client's .pub, then server,\n"
    "which takes the keys of train, strategy=federated and strategy.serve, 127.0.0.1:9092 by\n"
    "default; it needs images to score (val), none to train on. Who runs a client: key, then\n"
    "client, with the server's ca.crt; its images stay where they are.",
    "plan": "Measures the model on four images at most here, on one device; --json prints bytes.",
    "compare": "Trains in one mode after another from the same weights with the same samples;\n"
    "strategy.KEY=VALUE holds for every mode that has the key. Leaves a folder per run, and\n"
    "report.html, compare.json, compare.csv and compare.md. Ends with 1 when a mode failed.",
}
