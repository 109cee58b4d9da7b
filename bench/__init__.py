"""Benchmarks, quality measures and the training of the demo checkpoint. Only the command line imports this package.

`latentrt bench`:
    arguments, commands                   the command line, and what each of its commands does
    suite > run > side_run                all cases; one case; one side while its case is measured
    cases, models, grouping               the table of cases and sides, their models, and which sides fit in memory
    host > worker                         runs a side in a process of its own; what this process does
    side                                  the interface of a side: latentrt_side, diffusers_side, onnxruntime_side
    monitor, nvml, machine, stats         memory and energy, what a run was measured on, intervals of medians
Quality of pictures:
    judging > gates                       whether a side's pictures are good enough for its speed to be reported
    quality, features, inception, lpips   the metrics, and the networks that they need
Output:
    results                               the results, as JSON
    tables, plots, report                 the same for people, as text, Markdown and HTML
    markup                                any table of text, as Markdown and HTML
    live, compare, readme                 progress, changes between two runs, README's figures
Kernels:
    kernels, kernel_timing                times compared with PyTorch's own; how they are taken
    kernel_tuning, kernel_candidates      block sizes for this GPU, and which ones are tried
    compiled_kernels                      every kernel compiled for every architecture, without a GPU
    packing, timeline, profile            what packing gains; gaps between steps; where a picture's time goes
Long runs:
    full, gpu                             `make test-full` and `make gpu`, in parts
    pytest_resume, verdicts, shutdown     resuming tests, checking what a part wrote, ending processes
Whole models:
    full_size, full_size_engines          SDXL at full size: a forward on the CPU, exports and engines
    proportions, sdxl_blocks              SDXL's blocks timed on a CPU, and in both definitions
    sweep                                 the demo's time against quality, by steps
    random_checkpoint, demo_model         random weights at any size; the demo's training and evaluation
    null_cuda                             a CUDA device that computes nothing: memory at full size without a GPU
Serving:
    serve_load, serve_clients             `latentrt serve` under load, and who asks it
    serve_process, loadgen                its process; MLPerf's LoadGen
"""
