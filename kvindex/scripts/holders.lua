-- Reads which slots hold each of some blocks. Writes nothing.
--
-- KEYS[1]  directory of the pool
-- ARGV     hashes, 8 bytes each
-- Returns  {set of slots of each hash, empty if nobody holds it; what `fleet` returns}

local hashes = ARGV[1]
local num_buckets = tonumber(redis.call('HGET', DIRECTORY, 'buckets')) or 1
local power = power_within(num_buckets)
local sets = {}

for at = 1, #hashes, HASH_BYTES do
  local hash = hashes:sub(at, at + HASH_BYTES - 1)
  sets[#sets + 1] = redis.call('HGET', bucket_key(bucket_of(hash, num_buckets, power)), hash) or ''
end
return {sets, fleet(now_ms())}
