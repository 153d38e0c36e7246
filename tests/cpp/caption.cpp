// Runs the one graph from C++: caption caption.onnx photos.bin COUNT HEIGHT WIDTH
// photos.bin: RGB, uint8 [count, height, width, 3]. Prints, a line a photo, its token ids, a tab, and its words.
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

int main(int argc, char** argv) try {
  if (argc != 6) {
    std::cerr << "caption caption.onnx photos.bin COUNT HEIGHT WIDTH\n";
    return 2;
  }
  std::ifstream file(argv[2], std::ios::binary);
  std::vector<std::uint8_t> pixels{std::istreambuf_iterator<char>(file), {}};
  const std::vector<std::int64_t> shape{std::stoll(argv[3]), std::stoll(argv[4]), std::stoll(argv[5]), 3};

  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "caption");
  Ort::Session session(env, argv[1], Ort::SessionOptions{});
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto photos =
      Ort::Value::CreateTensor<std::uint8_t>(memory, pixels.data(), pixels.size(), shape.data(), shape.size());
  const char* inputs[] = {"photos"};
  const char* outputs[] = {"tokens", "lengths", "words"};
  auto results = session.Run(Ort::RunOptions{}, inputs, &photos, 1, outputs, 3);

  const auto* tokens = results[0].GetTensorData<std::int64_t>();
  const auto* lengths = results[1].GetTensorData<std::int64_t>();
  const auto longest = results[0].GetTensorTypeAndShapeInfo().GetShape()[1];
  for (std::int64_t row = 0; row < shape[0]; ++row) {
    for (std::int64_t word = 0; word < lengths[row]; ++word)
      std::cout << (word ? " " : "") << tokens[row * longest + word];
    std::cout << '\t';
    for (std::int64_t word = 0; word < lengths[row]; ++word)
      std::cout << (word ? " " : "") << results[2].GetStringTensorElement(row * longest + word);
    std::cout << '\n';
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 1;
}
