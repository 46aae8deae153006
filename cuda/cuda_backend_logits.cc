// The ops of the CudaBackend that take logits.
#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>
#include <numeric>

#include "cuda_backend.h"
#include "elementwise.h"
#include "sampling/sampling.h"
#include "update_inputs.h"

namespace fastllm::cuda {
namespace {

Logits logits_of(const Tensor& t) {
  assert(t.dtype == DType::F32 && t.rank == 2);
  return {t.ptr<float>(), t.stride[0], static_cast<int>(t.rows()), static_cast<int>(t.cols())};
}

}  // namespace

void CudaBackend::scale_softcap(const Tensor& logits, float scale, float softcap) {
  cuda::scale_softcap(logits.ptr<float>(), logits.stride[0], logits.rows(), logits.cols(), scale, softcap,
                      stream_.get());
}

void CudaBackend::mask_logits(const Tensor& logits, std::span<const std::int32_t> rows,
                              std::span<const std::uint32_t> bits) {
  if (rows.empty()) return;
  // Both at once: what one take() gave may be written over after the next.
  const std::size_t row_bytes = (rows.size_bytes() + 15) / 16 * 16;
  std::byte* memory = staging_.take(row_bytes + bits.size_bytes());
  std::memcpy(memory, rows.data(), rows.size_bytes());
  std::memcpy(memory + row_bytes, bits.data(), bits.size_bytes());
  cuda::mask_logits(logits_of(logits), reinterpret_cast<const std::int32_t*>(memory), static_cast<int>(rows.size()),
                    reinterpret_cast<const std::uint32_t*>(memory + row_bytes), stream_.get());
}

void CudaBackend::process_logits(const Tensor& logits, const Step& base) {
  const CudaStep& step = cuda_step(base);
  assert(step.samples && logits.rows() <= step.num_logit_rows);
  LogitsProcessing call = step.processing;
  call.counts = call.any_penalised ? counts() : nullptr;
  cuda::process_logits(logits_of(logits), call, stream_.get());
}

void CudaBackend::sample(const Tensor& logits, Step& base) {
  CudaStep& step = cuda_step(base);
  assert(step.samples && logits.rows() <= step.num_logit_rows && logits.rows() <= limits_.max_logit_rows);
  SampleCall call;
  call.rows = step.processing.rows;
  call.all_greedy = step.all_greedy;
  call.any_filter = step.any_filter;
  call.any_penalised = step.processing.any_penalised;
  call.counts = call.any_penalised ? counts() : nullptr;
  call.sampled = ring_->sampled();
  call.host_sampled = step.host_sampled;
  call.last_token = ring_->last_token();
  call.workspace = sample_workspace_->data();
  cuda::sample(logits_of(logits), call, stream_.get());
  step.tokens_known = true;
}

TokenId* CudaBackend::sampled_tokens(Step&) { return ring_->sampled(); }

void CudaBackend::commit_tokens(Step& base) {
  CudaStep& step = cuda_step(base);
  cuda::commit_tokens(ring_->sampled(), step.num_sampled, step.logit_tokens, step.view.token_slot, ring_->last_token(),
                      step.host_sampled, stream_.get());
  step.tokens_known = true;
}

void CudaBackend::topk_logprobs(const Tensor& logits, Step& base, std::span<const LogprobRequest> requests) {
  CudaStep& step = cuda_step(base);
  const auto slice = static_cast<std::size_t>(limits_.max_logit_rows);  // what the workspace is for
  for (; !requests.empty(); requests = requests.subspan(std::min(slice, requests.size()))) {
    const auto part = requests.first(std::min(slice, requests.size()));
    const int n = static_cast<int>(part.size());
    auto* rows = reinterpret_cast<DeviceLogprobRequest*>(staging_.take(part.size() * sizeof(DeviceLogprobRequest)));
    std::ranges::transform(part, rows, [](const LogprobRequest& r) {
      return DeviceLogprobRequest{r.row, r.token, std::min(r.top, kMaxDeviceTop), r.sampled};
    });
    cuda::topk_logprobs(logits_of(logits), rows, n, ring_->sampled(), step.add_results(n), logprob_workspace_->data(),
                        stream_.get());
    for (int i = 0; i < n; ++i) {
      const LogprobRequest& request = part[static_cast<std::size_t>(i)];
      if (request.top > kMaxDeviceTop) step.replace_result(i, host_logprobs(logits, step, request));
    }
  }
}

// Slow, for requests that want very many alternatives: waits for the stream and copies the row.
LogprobResult CudaBackend::host_logprobs(const Tensor& logits, const CudaStep& step, const LogprobRequest& request) {
  std::vector<float> x(static_cast<std::size_t>(logits.cols()));
  copy(x.data(), logits.at(request.row), x.size() * sizeof(float));
  LogprobResult result;
  result.token = request.sampled >= 0 ? std::max(step.host_sampled[request.sampled], 0) : request.token;
  const float max = *std::ranges::max_element(x), own = x[static_cast<std::size_t>(result.token)];
  const double sum = std::accumulate(x.begin(), x.end(), 0.0,
                                     [&](double s, float v) { return s + std::exp(static_cast<double>(v - max)); });
  const double log_z = static_cast<double>(max) + std::log(sum);
  const auto logprob = [&](float logit) { return static_cast<float>(static_cast<double>(logit) - log_z); };
  result.logprob = logprob(own);
  result.rank = 1 + static_cast<std::int32_t>(std::ranges::count_if(x, [&](float v) { return v > own; }));
  std::vector<std::int32_t> ids(x.size());
  std::iota(ids.begin(), ids.end(), 0);
  const auto top = std::min(static_cast<std::size_t>(request.top), ids.size());
  std::partial_sort(ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(top), ids.end(), [&](auto a, auto b) {
    const float u = x[static_cast<std::size_t>(a)], v = x[static_cast<std::size_t>(b)];
    return u != v ? u > v : a < b;
  });
  result.top.reserve(top);
  for (std::size_t i = 0; i < top; ++i) result.top.emplace_back(ids[i], logprob(x[static_cast<std::size_t>(ids[i])]));
  return result;
}

}  // namespace fastllm::cuda
