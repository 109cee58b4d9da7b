"""What several tests share. Imported as `helpers`: `from helpers.served import served`.

tiny_*                                small random models, calls of them, entries of the store
published_configs, original_layout    configurations of real models; SDXL's keys in a single file
parity, parity_cases, sampler_oracle  what diffusers computes, and which calls are compared with it
kernel_checks, engine_checks          an operator against float64; an engine that is replayed
loops, threads                        run a loop; work in several threads
stream_order, vector_clocks           whether streams are ordered; what each stream and thread comes after
tf32                                  a test for which PyTorch may use TF32
faults                                errors of the operating system to plant
waiting                               until a condition holds, a file is written, a process has ended
fake_*                                stand in for a clock, a device, its stream and captures, NVML, a runner, a
                                      builder, TensorRT
pipeline_insides                      a pipeline's plan, its networks on the device, its stored graphs
dry_timing                            kernels timed without a GPU
planted_sides, planted_reports        sides of the benchmark with known faults, and their reports
served, page_tab                      the application over a real socket; its page in Chromium
replicas, ray_runner, ray_server      an ingress over replicas of the tests' own; the same under Ray
"""
