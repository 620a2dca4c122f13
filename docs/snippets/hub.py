from pdiff_hf import PDiffPipeline, load_snapshots

pipe = PDiffPipeline.from_pretrained("user/digits-on-demand")
snapshots, layout = load_snapshots("user/digits-snapshots")
