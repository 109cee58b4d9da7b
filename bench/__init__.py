"""Benchmarks, quality measures and the training of the demo checkpoint. Only the command line imports this package.

`latentrt bench`:
    arguments, commands                   the command line, and what each of its commands does
    suite > run > side_run                cases in turn; a case; one side of it while it is measured
    cases, models, grouping               the table of cases and sides, their models, and which fit in memory together
    host > worker                         the process of its own that a side runs in; what it does there
    side                                  what a side is: latentrt_side, diffusers_side, onnxruntime_side
    monitor, nvml, machine, stats         memory and energy meanwhile; what it ran on; intervals of ratios
What judges pictures:
    gates                                 whether a side's pictures are good enough for its speed to be told
    quality, features, inception, lpips   the measures, and the networks under them
What is shown:
    results                               what was found, as JSON
    tables, plots, report                 the same for people, as text, Markdown and HTML
    live, compare, readme                 while it runs; between two runs; in the README
Kernels:
    kernels, kernel_timing                times beside PyTorch's own, and how they are taken
    kernel_tuning, compiled_kernels       block sizes for this GPU; every kernel compiled without one
    packing, timeline, profile            the layout's gain; gaps between steps; where a picture's time goes
Long runs:
    full, gpu                             `make test-full` and `make gpu`, part after part
    pytest_resume, verdicts, shutdown     tests are resumed; whether a part did its work; how processes end
Whole models:
    full_size, full_size_engines          SDXL at its full size: a forward on the CPU, exports and engines
    proportions, sweep                    what the demo says of SDXL; time against quality, by steps
    random_checkpoint, demo_model         random weights at any size; the demo's training and evaluation
    null_cuda                             a CUDA device that computes nothing: memory at full size without a GPU
Serving:
    serve_load, serve_process, loadgen    `latentrt serve` under load; its process; MLPerf's LoadGen
"""
