#include "model/bundle_writer.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "model/canonical.h"
#include "model/weight_loader.h"
#include "tensor/dtype.h"

namespace fastllm {
namespace {

constexpr std::int64_t kBlockElements = 1 << 20;

DType stored_dtype(const std::string& name) {
  if (name == "float16") return DType::F16;
  return dtype_from_name(name);
}

const char* safetensors_name(DType t) { return t == DType::F32 ? "F32" : t == DType::BF16 ? "BF16" : "F16"; }

// Rounds to nearest even; values beyond the range become infinite, as IEEE 754 says.
std::uint16_t to_half(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);  // NaN
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // subnormal: let the FPU round to a multiple of 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

void append(const float* values, std::int64_t n, DType dtype, std::vector<char>& out) {
  const auto count = static_cast<std::size_t>(n);
  out.resize(count * size_of(dtype));
  if (dtype == DType::F32) {
    std::memcpy(out.data(), values, out.size());
    return;
  }
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint16_t bits = dtype == DType::BF16 ? to_bf16(values[i]).bits : to_half(values[i]);
    std::memcpy(out.data() + 2 * i, &bits, 2);
  }
}

class File {
 public:
  explicit File(const std::string& path)
      : path_(path), part_(path + ".part"), out_(part_, std::ios::binary | std::ios::trunc) {
    check();
  }
  ~File() {
    if (!done_) std::remove(part_.c_str());
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void write(const char* data, std::size_t bytes) {
    out_.write(data, static_cast<std::streamsize>(bytes));
    check();
  }
  void commit() {
    out_.close();
    check();
    std::filesystem::rename(part_, path_);
    done_ = true;
  }

 private:
  void check() const {
    if (!out_) throw ResourceError("cannot write " + part_ + ": " + std::strerror(errno));
  }
  std::string path_, part_;
  std::ofstream out_;
  bool done_ = false;
};

}  // namespace

void write_weights(const ModelSpec& spec, const std::vector<WeightBinding>& weights, const std::string& path,
                   const std::string& dtype) {
  const DType matrix_dtype = stored_dtype(dtype);
  const ModelSource source{spec, weights};
  const WeightLoader loader(source, 0, 1);
  const auto all = canonical_weights(spec);

  nlohmann::json header;
  std::int64_t offset = 0;
  for (const auto& weight : all) {
    const DType type = weight.shape.size() == 2 ? matrix_dtype : DType::F32;
    std::int64_t bytes = static_cast<std::int64_t>(size_of(type));
    for (auto d : weight.shape) bytes *= d;
    header[weight.name] = {
        {"dtype", safetensors_name(type)}, {"shape", weight.shape}, {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // data starts aligned

  File file(path);
  std::uint64_t length = text.size();
  char prefix[8];
  for (char& byte : prefix) {
    byte = static_cast<char>(length & 0xff);
    length >>= 8;
  }
  file.write(prefix, sizeof prefix);
  file.write(text.data(), text.size());

  std::vector<float> rows;
  std::vector<char> out;
  for (const auto& weight : all) {
    if (weight.shape.size() == 1) {
      const auto values = loader.vector(weight.name);
      append(values.data(), static_cast<std::int64_t>(values.size()), DType::F32, out);
      file.write(out.data(), out.size());
      continue;
    }
    const HostMatrix matrix = loader.matrix(weight.name);
    const std::int64_t step = std::max<std::int64_t>(1, kBlockElements / std::max<std::int64_t>(1, matrix.cols));
    for (std::int64_t begin = 0; begin < matrix.rows; begin += step) {
      const std::int64_t end = std::min(begin + step, matrix.rows);
      rows.resize(static_cast<std::size_t>((end - begin) * matrix.cols));
      matrix.read(begin, end, rows.data());
      append(rows.data(), (end - begin) * matrix.cols, matrix_dtype, out);
      file.write(out.data(), out.size());
    }
  }
  file.commit();
}

}  // namespace fastllm
