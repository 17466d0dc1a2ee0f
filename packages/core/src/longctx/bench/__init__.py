"""``longctx bench``: backends and peers timed in turns on the standard shapes, right results only.

`longctx.bench.shapes` says what is measured, `longctx.bench.counting` what it costs,
`longctx.bench.workloads` how inputs and exact results are made, `longctx.bench.peers` who else is
asked, `longctx.bench.session` runs it all. Nothing here is imported by ``import longctx``.
"""
