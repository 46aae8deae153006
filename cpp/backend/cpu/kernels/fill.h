// Each file of this folder fills its part of the table, in the namespace of the instruction set it is compiled for.
#pragma once

#include "backend/cpu/kernels.h"

namespace fastllm::cpu::FASTLLM_ISA {

void fill_gemm(Kernels& t);
void fill_gemm_amx(Kernels& t);
void fill_quant_rows(Kernels& t);
void fill_quant(Kernels& t);
void fill_quant_amx(Kernels& t);
void fill_choose(Kernels& t);
void fill_norm(Kernels& t);
void fill_rope_kv(Kernels& t);
void fill_attention(Kernels& t);
void fill_attention_pairs(Kernels& t);  // AVX-512 only, as table_bf16()
void fill_act(Kernels& t);
void fill_sample(Kernels& t);

Kernels table();
Kernels table_bf16();  // AVX-512 only: with the products of AVX512_BF16

}  // namespace fastllm::cpu::FASTLLM_ISA
