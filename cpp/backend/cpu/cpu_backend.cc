#include "backend/cpu/cpu_backend.h"

#include <algorithm>
#include <cassert>
#include <cstring>

#include "backend/cpu/isa.h"
#include "fastllm/error.h"

namespace fastllm {

std::unique_ptr<Backend> make_cpu_backend(const ThreadPlacement& placement, const std::string& isa) {
  const int threads = placement.threads;
  if (threads < 1) throw InvalidArgument("threads is " + std::to_string(threads) + "; it must be at least 1");
  return std::make_unique<cpu::CpuBackend>(placement, isa);
}

std::unique_ptr<Backend> make_cpu_backend(int threads, const std::string& isa) {
  return make_cpu_backend(ThreadPlacement{threads, {}}, isa);
}

namespace cpu {

CpuBackend::CpuBackend(const ThreadPlacement& placement, const std::string& isa)
    : kernels_(select_kernels(isa)),
      pool_(placement.threads, placement.cpus),
      ranges_(static_cast<std::size_t>(pool_.size())) {}

DeviceInfo CpuBackend::info() const {
  const MemoryInfo memory = memory_info();
  const int n = pool_.size();
  return {std::string("cpu (") + kernels_.name + ", " + std::to_string(n) + (n == 1 ? " thread)" : " threads)"),
          memory.free, memory.total};
}

std::unique_ptr<Buffer> CpuBackend::allocate(std::size_t bytes, MemoryKind) { return std::make_unique<Pages>(bytes); }

void CpuBackend::copy(void* dst, const void* src, std::size_t bytes) {
  if (bytes > 0) std::memcpy(dst, src, bytes);
}

std::byte* CpuBackend::thread_scratch(std::size_t bytes) {
  const std::size_t stride = (bytes + 127) / 128 * 128;
  return static_cast<std::byte*>(per_thread_.get(stride * static_cast<std::size_t>(pool_.size())));
}

void CpuBackend::add_positions(const Tensor& x, const Step& step, const Tensor& table) {
  const auto& positions = cpu_step(step).positions;
  assert(x.dtype == DType::F32 && table.dtype == DType::F32 && x.cols() == table.cols());
  assert(static_cast<std::size_t>(x.rows()) == positions.size());
  split(x.rows(), x.cols(), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) {
      kernels_.add(static_cast<float*>(x.at(t)),
                   static_cast<const float*>(table.at(positions[static_cast<std::size_t>(t)])), x.cols());
    }
  });
}

void CpuBackend::norm(const Tensor& out, const Tensor& x, const NormSpec& spec, const float* weight,
                      const float* bias) {
  assert(spec.kind != NormKind::None && out.rows() == x.rows() && out.cols() == x.cols());
  const NormArgs a{.x = x.data,
                   .delta = nullptr,
                   .out = out.data,
                   .ldx = x.stride[0],
                   .ldd = 0,
                   .ldo = out.stride[0],
                   .cols = x.cols(),
                   .weight = weight,
                   .bias = bias,
                   .eps = spec.eps,
                   .layer = spec.kind == NormKind::Layer,
                   .x_bf16 = is_bf16(x.dtype),
                   .out_bf16 = is_bf16(out.dtype)};
  split(x.rows(), x.cols(), [&](std::int64_t begin, std::int64_t end, int) { kernels_.norm(a, begin, end); });
}

void CpuBackend::add_norm(const Tensor& out, const Tensor& residual, const Tensor& delta, const NormSpec& spec,
                          const float* weight, const float* bias) {
  assert(spec.kind != NormKind::None && residual.dtype == DType::F32 && delta.dtype == DType::F32);
  const NormArgs a{.x = residual.data,
                   .delta = static_cast<const float*>(delta.data),
                   .out = out.data,
                   .ldx = residual.stride[0],
                   .ldd = delta.stride[0],
                   .ldo = out.stride[0],
                   .cols = residual.cols(),
                   .weight = weight,
                   .bias = bias,
                   .eps = spec.eps,
                   .layer = spec.kind == NormKind::Layer,
                   .x_bf16 = false,
                   .out_bf16 = is_bf16(out.dtype)};
  split(residual.rows(), residual.cols(),
        [&](std::int64_t begin, std::int64_t end, int) { kernels_.norm(a, begin, end); });
}

void CpuBackend::gated_act(const Tensor& out, const Tensor& gate_up, Activation act) {
  const std::int64_t inner = out.cols();
  assert(gate_up.cols() == 2 * inner && gate_up.dtype == out.dtype);
  // One row alone is cut across its columns.
  const std::int64_t pieces = out.rows() == 1 ? 8 : 1;
  const std::int64_t width = round_up((inner + pieces - 1) / pieces, 64);
  const auto element = static_cast<std::int64_t>(size_of(out.dtype));
  split(out.rows() * pieces, width * 4, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t from = i % pieces * width, n = std::min(width, inner - from);
      if (n <= 0) continue;
      const auto* gate = static_cast<const std::byte*>(gate_up.at(i / pieces)) + from * element;
      kernels_.gated_act(static_cast<std::byte*>(out.at(i / pieces)) + from * element, gate, gate + inner * element,
                         is_bf16(out.dtype), n, to_act(act));
    }
  });
}

void CpuBackend::act(const Tensor& x, Activation act) {
  split(x.rows(), x.cols() * 4, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t) kernels_.act(x.at(t), is_bf16(x.dtype), x.cols(), to_act(act));
  });
}

void CpuBackend::add(const Tensor& x, const Tensor& y) {
  assert(x.dtype == DType::F32 && y.dtype == DType::F32 && x.rows() == y.rows() && x.cols() == y.cols());
  split(x.rows(), x.cols(), [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t)
      kernels_.add(static_cast<float*>(x.at(t)), static_cast<const float*>(y.at(t)), x.cols());
  });
}

void CpuBackend::gather_rows(const Tensor& out, const Tensor& x, std::span<const std::int32_t> rows) {
  assert(out.dtype == x.dtype && out.cols() == x.cols());
  const std::size_t bytes = static_cast<std::size_t>(x.cols()) * size_of(x.dtype);
  for (std::size_t i = 0; i < rows.size(); ++i) std::memcpy(out.at(static_cast<std::int64_t>(i)), x.at(rows[i]), bytes);
}

void CpuBackend::gather_logit_rows(const Tensor& out, const Tensor& x, const Step& step) {
  gather_rows(out, x, cpu_step(step).logit_tokens);
}

void CpuBackend::scale_softcap(const Tensor& logits, float scale, float softcap) {
  split(logits.rows(), logits.cols() * 2, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t r = begin; r < end; ++r)
      kernels_.scale_softcap(static_cast<float*>(logits.at(r)), logits.cols(), scale, softcap);
  });
}

void CpuBackend::copy_blocks(void* dst_pool, const void* src_pool, std::size_t block_bytes,
                             std::span<const std::pair<BlockId, BlockId>> from_to) {
  // In order and on one thread: a block may be read by one pair and written by the next.
  for (const auto& [from, to] : from_to) {
    std::memmove(static_cast<std::byte*>(dst_pool) + index(to) * block_bytes,
                 static_cast<const std::byte*>(src_pool) + index(from) * block_bytes, block_bytes);
  }
}

}  // namespace cpu
}  // namespace fastllm
