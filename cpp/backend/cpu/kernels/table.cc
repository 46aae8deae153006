// The table of this instruction set.
#include "backend/cpu/kernels/fill.h"

namespace fastllm::cpu::FASTLLM_ISA {

Kernels table() {
  Kernels t{};
  t.name = FASTLLM_ISA_NAME;
  fill_gemm(t);
  fill_gemm_amx(t);
  fill_quant_rows(t);
  fill_quant(t);
  fill_quant_amx(t);
  fill_choose(t);
  fill_norm(t);
  fill_rope_kv(t);
  fill_attention(t);
  fill_act(t);
  fill_sample(t);
  return t;
}

}  // namespace fastllm::cpu::FASTLLM_ISA
