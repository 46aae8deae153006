// What the machine can do at most, measured once at start: the denominators of every other benchmark.
#pragma once

namespace fastllm::bench {

struct Ceilings {
  double read_one = 0, read_all = 0;  // bytes/s from memory, one thread and all
  double fp32 = 0;                    // FLOP/s of fp32 multiply-adds, all threads
  double bf16 = 0;       // FLOP/s of bf16 products of tiles, else of vectors, all threads; 0 without either
  double int8 = 0;       // OP/s of int8 tile products, all threads; 0 without AMX
  double int8_vnni = 0;  // OP/s of int8 products in vector registers, all threads; 0 without VNNI
};

// Takes about two seconds; the best of several short runs each. Measured on the first call.
const Ceilings& ceilings();

// Threads every benchmark uses: FASTLLM_BENCH_THREADS, else all usable cores.
int threads();

}  // namespace fastllm::bench
