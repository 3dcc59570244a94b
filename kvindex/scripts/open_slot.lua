-- Gives a worker a fresh, empty slot and fences the one it held before.
--
-- KEYS[1]  directory of the pool
-- ARGV     worker id, incarnation, worker as JSON, lease in ms, 1 to take over from a live process,
--          kind and detail of the event
-- Returns  the slot, or the incarnation that holds a live lease under this worker id

local worker_id, incarnation, worker, lease_ms, takeover, kind, detail = unpack(ARGV)
local now = now_ms()

local former = redis.call('HGET', IDS, worker_id)
if former then
  local holder = redis.call('HGET', SLOT .. former, 'incarnation')
  if holder and holder ~= incarnation and takeover ~= '1' and expiry_of(read_row(former)) > now then
    return holder
  end
  fence(former, 'fenced', holder == incarnation and 'it has a fresh slot' or 'another process took its place')
end

local members = read_set('members')
local taken = union(members, union(read_set('dead'), read_set('sweeping')))
local slot = 0
while band(taken[floor(slot / 32) + 1] or 0, lshift(1, slot % 32)) ~= 0 do
  slot = slot + 1
end
if slot > MAX_SLOT then
  return redis.error_reply('the pool has no free slot')
end

local epoch = redis.call('HINCRBY', DIRECTORY, 'version', 1)
write_set('members', union(members, set_of(slot)))
redis.call('HSETNX', DIRECTORY, 'buckets', 1)
redis.call('HSET', IDS, worker_id, slot)
redis.call('HSET', SLOT .. slot, 'worker_id', worker_id, 'worker', worker, 'incarnation', incarnation,
  'sequence', 0, 'count', 0, 'digest', pack('<I4I4', 0, 0))
redis.call('PERSIST', LOG)
redis.call('PERSIST', REMOVALS)
note_event(kind, slot, worker_id, incarnation, detail)
write_row(slot, pack(LIVE_HEAD, now + lease_ms, lease_ms, epoch, 0, 0) .. NO_ROW:sub(LOAD_AT))
return slot
