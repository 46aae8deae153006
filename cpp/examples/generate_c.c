/* The same through the C ABI.
 *   generate_c BUNDLE 16 1 504 3575 282 4649 314 */
#include <fastllm/c_api.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char** argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: %s BUNDLE MAX_TOKENS TOKEN_ID...\n", argv[0]);
    return 2;
  }
  char error[512];
  fl_engine_config config;
  fl_engine_config_init(&config);
  config.dtype = "float32";
  config.max_num_seqs = 4;
  fl_engine* engine = NULL;
  if (fl_engine_open(argv[1], &config, &engine, error, sizeof error) != FL_OK) {
    fprintf(stderr, "generate_c: %s\n", error);
    return 1;
  }

  const size_t num_prompt = (size_t)(argc - 3);
  int32_t* prompt = malloc(num_prompt * sizeof *prompt);
  for (size_t i = 0; i < num_prompt; ++i) prompt[i] = atoi(argv[i + 3]);
  fl_sampling sampling;
  fl_sampling_init(&sampling);
  sampling.temperature = 0;
  sampling.max_tokens = atoi(argv[2]);

  int status = fl_submit(engine, 1, prompt, num_prompt, &sampling, error, sizeof error) == FL_OK ? -1 : 1;
  while (status < 0) {
    fl_batch* batch = NULL;
    if (fl_poll(engine, 1000, &batch, error, sizeof error) != FL_OK) {
      fprintf(stderr, "generate_c: %s\n", error);
      status = 1;
      break;
    }
    for (size_t i = 0; i < fl_batch_size(batch); ++i) {
      const fl_delta delta = fl_batch_get(batch, i);
      for (size_t k = 0; k < delta.num_tokens; ++k) printf("%d\n", delta.tokens[k]);
      if (delta.finish == FL_ERROR) fprintf(stderr, "%s\n", delta.error);
      if (delta.finish != FL_RUNNING) status = delta.finish == FL_ERROR;
    }
    fl_batch_destroy(batch);
  }
  free(prompt);
  fl_engine_destroy(engine);
  return status;
}
