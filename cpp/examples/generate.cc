// Opens a bundle and prints the greedy continuation of a prompt of token ids, one id a line.
//   fastllm export MODEL BUNDLE && generate BUNDLE 16 1 504 3575 282 4649 314
#include <fastllm/engine.h>

#include <chrono>
#include <cstdlib>
#include <exception>
#include <iostream>

int main(int argc, char** argv) {
  if (argc < 4) {
    std::cerr << "usage: " << argv[0] << " BUNDLE MAX_TOKENS TOKEN_ID...\n";
    return 2;
  }
  try {
    fastllm::EngineConfig config;
    config.dtype = "float32";
    config.max_num_seqs = 4;
    auto engine = fastllm::Engine::open(config, argv[1]);

    fastllm::RequestInput request;
    request.id = 1;
    request.sampling.temperature = 0;
    request.sampling.max_tokens = std::atoi(argv[2]);
    for (int i = 3; i < argc; ++i) request.prompt.push_back(std::atoi(argv[i]));
    engine->submit(std::move(request));

    for (std::vector<fastllm::TokenDelta> news;; news.clear()) {
      engine->poll(news, std::chrono::seconds(1));
      for (const auto& delta : news) {
        for (auto token : delta.tokens) std::cout << token << '\n';
        if (delta.finish == fastllm::FinishReason::Error) std::cerr << delta.error << '\n';
        if (delta.finish != fastllm::FinishReason::None) return delta.finish == fastllm::FinishReason::Error;
      }
    }
  } catch (const std::exception& e) {
    std::cerr << "generate: " << e.what() << '\n';
    return 1;
  }
}
