BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE audit (
	id VARCHAR(26) NOT NULL, 
	time FLOAT NOT NULL, 
	owner TEXT NOT NULL, 
	token_id VARCHAR(26), 
	action TEXT NOT NULL, 
	target TEXT NOT NULL, 
	detail JSON NOT NULL, 
	address TEXT, 
	CONSTRAINT audit_key PRIMARY KEY (id)
);
CREATE TABLE deliveries (
	id VARCHAR(26) NOT NULL, 
	webhook_id VARCHAR(26) NOT NULL, 
	run_id VARCHAR(26) NOT NULL, 
	body JSON NOT NULL, 
	created FLOAT NOT NULL, 
	attempts INTEGER NOT NULL, 
	due FLOAT, 
	delivered FLOAT, 
	answer TEXT, 
	CONSTRAINT deliveries_key PRIMARY KEY (id), 
	CONSTRAINT deliveries_webhook_id_known FOREIGN KEY(webhook_id) REFERENCES webhooks (id) ON DELETE CASCADE
);
INSERT INTO "deliveries" VALUES('01M8Q085FJ2N6E8Q66TDGGS34F','01M8Q085FC27MNPP9C455S9DVQ','01M8Q085FDC6JGHQ5BTSHSWVNA','{"id":"01M8Q085FJ2N6E8Q66TDGGS34F","type":"run.state","time":1800000000.0,"run":{"id":"01M8Q085FDC6JGHQ5BTSHSWVNA","name":"succeeded","owner":"ann","state":"queued","reason":null,"attempt":0,"dollars":0.0}}',1800000000.0,0,1800000000.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q085FW1TMV49NESS86FF8K','01M8Q085FC27MNPP9C455S9DVQ','01M8Q085FDC6JGHQ5BTSHSWVNA','{"id":"01M8Q085FW1TMV49NESS86FF8K","type":"run.state","time":1800000010.0,"run":{"id":"01M8Q085FDC6JGHQ5BTSHSWVNA","name":"succeeded","owner":"ann","state":"starting","reason":null,"attempt":1,"dollars":0.0}}',1800000010.0,0,1800000010.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086QX8TCCBWPJTGN05730','01M8Q085FC27MNPP9C455S9DVQ','01M8Q085FDC6JGHQ5BTSHSWVNA','{"id":"01M8Q086QX8TCCBWPJTGN05730","type":"run.state","time":1800000030.0,"run":{"id":"01M8Q085FDC6JGHQ5BTSHSWVNA","name":"succeeded","owner":"ann","state":"succeeded","reason":null,"attempt":1,"dollars":0.0002675336884127723}}',1800000030.0,0,1800000030.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086R28YSYHC01D2FVPQJP','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086R1CCCRXTBA6DJQ19ZB','{"id":"01M8Q086R28YSYHC01D2FVPQJP","type":"run.state","time":1800000040.0,"run":{"id":"01M8Q086R1CCCRXTBA6DJQ19ZB","name":"failed","owner":"ann","state":"queued","reason":null,"attempt":0,"dollars":0.0}}',1800000040.0,0,1800000040.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086R61AK6BZ63SS6JE7RT','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086R1CCCRXTBA6DJQ19ZB','{"id":"01M8Q086R61AK6BZ63SS6JE7RT","type":"run.state","time":1800000050.0,"run":{"id":"01M8Q086R1CCCRXTBA6DJQ19ZB","name":"failed","owner":"ann","state":"starting","reason":null,"attempt":1,"dollars":0.0}}',1800000050.0,0,1800000050.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086RE70TDXZMWR02XW23R','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086R1CCCRXTBA6DJQ19ZB','{"id":"01M8Q086RE70TDXZMWR02XW23R","type":"run.state","time":1800000060.0,"run":{"id":"01M8Q086R1CCCRXTBA6DJQ19ZB","name":"failed","owner":"ann","state":"running","reason":null,"attempt":1,"dollars":0.0}}',1800000060.0,0,1800000060.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086RQ88220CP8T97958B0','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086R1CCCRXTBA6DJQ19ZB','{"id":"01M8Q086RQ88220CP8T97958B0","type":"run.state","time":1800000070.0,"run":{"id":"01M8Q086R1CCCRXTBA6DJQ19ZB","name":"failed","owner":"ann","state":"failed","reason":"no space left on device","attempt":1,"dollars":0.0}}',1800000070.0,0,1800000070.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086RWDB62567FEBP2J74T','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086RVE0B6QJ4PHYE0QVX7','{"id":"01M8Q086RWDB62567FEBP2J74T","type":"run.state","time":1800000080.0,"run":{"id":"01M8Q086RVE0B6QJ4PHYE0QVX7","name":"cancelled","owner":"ann","state":"queued","reason":null,"attempt":0,"dollars":0.0}}',1800000080.0,0,1800000080.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086RZ1N4QQJAJR8NVH21D','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086RVE0B6QJ4PHYE0QVX7','{"id":"01M8Q086RZ1N4QQJAJR8NVH21D","type":"run.state","time":1800000090.0,"run":{"id":"01M8Q086RVE0B6QJ4PHYE0QVX7","name":"cancelled","owner":"ann","state":"starting","reason":null,"attempt":1,"dollars":0.0}}',1800000090.0,0,1800000090.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086S52HM11PQ6BVW9XASZ','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086RVE0B6QJ4PHYE0QVX7','{"id":"01M8Q086S52HM11PQ6BVW9XASZ","type":"run.state","time":1800000100.0,"run":{"id":"01M8Q086RVE0B6QJ4PHYE0QVX7","name":"cancelled","owner":"ann","state":"running","reason":null,"attempt":1,"dollars":0.0}}',1800000100.0,0,1800000100.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086SE3A46J63N7WVYR4H3','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086RVE0B6QJ4PHYE0QVX7','{"id":"01M8Q086SE3A46J63N7WVYR4H3","type":"run.state","time":1800000100.0,"run":{"id":"01M8Q086RVE0B6QJ4PHYE0QVX7","name":"cancelled","owner":"ann","state":"stopping","reason":null,"attempt":1,"dollars":0.0}}',1800000100.0,0,1800000100.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086SM099JYWXA2CPNPZZ4','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086RVE0B6QJ4PHYE0QVX7','{"id":"01M8Q086SM099JYWXA2CPNPZZ4","type":"run.state","time":1800000110.0,"run":{"id":"01M8Q086RVE0B6QJ4PHYE0QVX7","name":"cancelled","owner":"ann","state":"cancelled","reason":"cancelled","attempt":1,"dollars":0.0}}',1800000110.0,0,1800000110.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086SS8SHVKMKW3RXQF2EC','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086SQANGFFETRPFTJC8D8','{"id":"01M8Q086SS8SHVKMKW3RXQF2EC","type":"run.state","time":1800000120.0,"run":{"id":"01M8Q086SQANGFFETRPFTJC8D8","name":"active","owner":"ann","state":"queued","reason":null,"attempt":0,"dollars":0.0}}',1800000120.0,0,1800000120.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086SW2JF18SS7G1YBSV9Z','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086SQANGFFETRPFTJC8D8','{"id":"01M8Q086SW2JF18SS7G1YBSV9Z","type":"run.state","time":1800000130.0,"run":{"id":"01M8Q086SQANGFFETRPFTJC8D8","name":"active","owner":"ann","state":"starting","reason":null,"attempt":1,"dollars":0.0}}',1800000130.0,0,1800000130.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086T3CBAPRWGJMPS64XCK','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086SQANGFFETRPFTJC8D8','{"id":"01M8Q086T3CBAPRWGJMPS64XCK","type":"run.state","time":1800000140.0,"run":{"id":"01M8Q086SQANGFFETRPFTJC8D8","name":"active","owner":"ann","state":"running","reason":null,"attempt":1,"dollars":0.0}}',1800000140.0,0,1800000140.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086TG5F8CJ9ANBRE6CSSA','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086TFE2Y09M51A4HCFCJF','{"id":"01M8Q086TG5F8CJ9ANBRE6CSSA","type":"run.state","time":1800000750.0,"run":{"id":"01M8Q086TFE2Y09M51A4HCFCJF","name":"stopping","owner":"ann","state":"queued","reason":null,"attempt":0,"dollars":0.0}}',1800000750.0,0,1800000750.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086TN853PK3D2Q92DA9VG','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086TFE2Y09M51A4HCFCJF','{"id":"01M8Q086TN853PK3D2Q92DA9VG","type":"run.state","time":1800000760.0,"run":{"id":"01M8Q086TFE2Y09M51A4HCFCJF","name":"stopping","owner":"ann","state":"starting","reason":null,"attempt":1,"dollars":0.0}}',1800000760.0,0,1800000760.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086TWFY938ZWTXH6425ZR','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086TFE2Y09M51A4HCFCJF','{"id":"01M8Q086TWFY938ZWTXH6425ZR","type":"run.state","time":1800000770.0,"run":{"id":"01M8Q086TFE2Y09M51A4HCFCJF","name":"stopping","owner":"ann","state":"running","reason":null,"attempt":1,"dollars":0.0}}',1800000770.0,0,1800000770.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086V41RR425KPE1QG83Z9','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086TFE2Y09M51A4HCFCJF','{"id":"01M8Q086V41RR425KPE1QG83Z9","type":"run.state","time":1800000770.0,"run":{"id":"01M8Q086TFE2Y09M51A4HCFCJF","name":"stopping","owner":"ann","state":"stopping","reason":null,"attempt":1,"dollars":0.0}}',1800000770.0,0,1800000770.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086V93SGWC6NXXB8WS8QZ','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086V86HW02QNXQBPAVRJK','{"id":"01M8Q086V93SGWC6NXXB8WS8QZ","type":"run.state","time":1800000780.0,"run":{"id":"01M8Q086V86HW02QNXQBPAVRJK","name":"starting","owner":"ann","state":"queued","reason":null,"attempt":0,"dollars":0.0}}',1800000780.0,0,1800000780.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086VF63JR1HKRZMCGZMV1','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086V86HW02QNXQBPAVRJK','{"id":"01M8Q086VF63JR1HKRZMCGZMV1","type":"run.state","time":1800000790.0,"run":{"id":"01M8Q086V86HW02QNXQBPAVRJK","name":"starting","owner":"ann","state":"starting","reason":null,"attempt":1,"dollars":0.0}}',1800000790.0,0,1800000790.0,NULL,NULL);
INSERT INTO "deliveries" VALUES('01M8Q086VH9RQRNM1E0G1VK0SR','01M8Q085FC27MNPP9C455S9DVQ','01M8Q086VG6JNAM4ZARQ7ACGGM','{"id":"01M8Q086VH9RQRNM1E0G1VK0SR","type":"run.state","time":1800000790.0,"run":{"id":"01M8Q086VG6JNAM4ZARQ7ACGGM","name":"queued","owner":"ann","state":"queued","reason":null,"attempt":0,"dollars":0.0}}',1800000790.0,0,1800000790.0,NULL,NULL);
CREATE TABLE events (
	run_id VARCHAR(26) NOT NULL, 
	position INTEGER NOT NULL, 
	time FLOAT NOT NULL, 
	type VARCHAR(32) NOT NULL, 
	stage VARCHAR(32), 
	unit VARCHAR(64), 
	data JSON NOT NULL, 
	CONSTRAINT events_key PRIMARY KEY (run_id, position), 
	CONSTRAINT events_run_id_known FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',0,1800000000.0,'state',NULL,NULL,'{"state":"queued","reason":null,"attempt":0}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',1,1800000010.0,'state',NULL,NULL,'{"state":"starting","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',2,1.79606834944019937e+09,'run_started',NULL,NULL,'{"name":"succeeded","directory":"@ROOT@/runs/01M8Q085FDC6JGHQ5BTSHSWVNA/succeeded","stages":["corpus","seed","cluster","decompose","submodels","merge","finetune","evaluate","export"]}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',3,1.79606834944362354e+09,'stage_started','corpus',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',4,1.79606834982764744e+09,'stage_finished','corpus',NULL,'{"seconds":0.38,"summary":{"documents":2076,"validation_documents":97,"duplicates":111,"tokens":213331,"validation_tokens":8928,"bytes":455015,"vocab_size":400,"sources":{"asyncio":{"documents":2076,"tokens":213331,"bytes":455015}}}}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',5,1.79606834982775235e+09,'stage_started','seed',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',6,1.79606834988087296e+09,'workers_held','seed',NULL,'{"hold":"0d18410a4d5d","pool":"low_memory","workers":1}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',7,1.79606834995531058e+09,'progress','seed','seed','{"step":1,"steps":5,"tokens":1024,"loss":5.99513053894043,"lr":0.002,"grad_norm":0.34258580207824707,"tokens_per_second":64286.617868120346}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',8,1.7960683499662044e+09,'progress','seed','seed','{"step":2,"steps":5,"tokens":2048,"loss":5.979446887969971,"lr":0.002,"grad_norm":0.3665784001350403,"tokens_per_second":94018.76316940974}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',9,1.79606834997521495e+09,'progress','seed','seed','{"step":3,"steps":5,"tokens":3072,"loss":5.946267604827881,"lr":0.002,"grad_norm":0.38432779908180237,"tokens_per_second":113629.98304762771}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',10,1.79606834998245668e+09,'progress','seed','seed','{"step":4,"steps":5,"tokens":4096,"loss":5.92179012298584,"lr":0.002,"grad_norm":0.4162331521511078,"tokens_per_second":141396.7597218065}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',11,1.79606834999596929e+09,'progress','seed','seed','{"step":5,"steps":5,"tokens":5120,"loss":5.895169734954834,"lr":0.002,"grad_norm":0.4839477837085724,"tokens_per_second":75801.78898156388}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',12,1.79606835002360248e+09,'checkpoint','seed','seed','{"step":5,"stall":0.018977,"latency":0.030131}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',13,1.79606835002401089e+09,'workers_released','seed',NULL,'{"hold":"0d18410a4d5d"}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',14,1.79606835003023052e+09,'stage_finished','seed',NULL,'{"seconds":0.197,"summary":{"units":[{"name":"seed","steps":5,"planned_steps":5,"tokens":5120,"loss":5.895169734954834,"seconds":0.05,"workers":1.0,"held":{"low_memory":0.143},"contribution":"finished","reason":null}]}}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',15,1.79606835003033471e+09,'stage_started','cluster',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',16,1.79606835008663415e+09,'clusters','cluster',NULL,'{"documents":[72,64],"tokens":[7333,7936]}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',17,1.79606835009069681e+09,'stage_finished','cluster',NULL,'{"seconds":0.056,"summary":{"clusters":[{"documents":72,"tokens":7333},{"documents":64,"tokens":7936}],"inertia":76.15765709677697,"iterations":1,"silhouette":0.17817112803459167,"nmi":null,"balance":1.0394917807322026,"held":{}}}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',18,1796068350.0908,'stage_started','decompose',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',19,1.79606835011158609e+09,'stage_finished','decompose',NULL,'{"seconds":0.014,"summary":{"bytes":[131712,131712]}}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',20,1.79606835011169981e+09,'stage_started','submodels',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',21,1.79606835011227774e+09,'workers_held','submodels',NULL,'{"hold":"7894b48b8a2d","pool":"low_memory","workers":1}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',22,1.79606835013486218e+09,'progress','submodels','submodel-1','{"step":1,"steps":6,"tokens":1024,"loss":5.866793155670166,"lr":0.002,"grad_norm":0.5335385799407959,"tokens_per_second":119936.50392781661}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',23,1.79606835014235901e+09,'progress','submodels','submodel-1','{"step":2,"steps":6,"tokens":2048,"loss":5.8167290687561035,"lr":0.002,"grad_norm":0.5517390370368958,"tokens_per_second":136611.1105930331}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',24,1.79606835014975023e+09,'progress','submodels','submodel-1','{"step":3,"steps":6,"tokens":3072,"loss":5.766742706298828,"lr":0.002,"grad_norm":0.5286427736282349,"tokens_per_second":138543.394793637}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',25,1796068350.15698,'progress','submodels','submodel-1','{"step":4,"steps":6,"tokens":4096,"loss":5.698269844055176,"lr":0.002,"grad_norm":0.5439184904098511,"tokens_per_second":141568.6469686183}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',26,1.79606835016460585e+09,'progress','submodels','submodel-1','{"step":5,"steps":6,"tokens":5120,"loss":5.6446852684021,"lr":0.002,"grad_norm":0.5629212260246277,"tokens_per_second":134299.08011731738}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',27,1796068350.18176,'progress','submodels','submodel-1','{"step":6,"steps":6,"tokens":6144,"loss":5.604262351989746,"lr":0.002,"grad_norm":0.5397751927375793,"tokens_per_second":59710.46720995502}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',28,1.79606835020156478e+09,'checkpoint','submodels','submodel-1','{"step":6,"stall":0.016851,"latency":0.029504}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',29,1.7960683502020502e+09,'workers_released','submodels',NULL,'{"hold":"7894b48b8a2d"}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',30,1.79606835020212101e+09,'workers_held','submodels',NULL,'{"hold":"dab5312f1a77","pool":"low_memory","workers":1}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',31,1.79606835022907018e+09,'progress','submodels','submodel-0','{"step":1,"steps":5,"tokens":1024,"loss":5.845029830932617,"lr":0.002,"grad_norm":0.5356318354606628,"tokens_per_second":123051.6472032896}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',32,1.79606835023614263e+09,'progress','submodels','submodel-0','{"step":2,"steps":5,"tokens":2048,"loss":5.772104740142822,"lr":0.002,"grad_norm":0.575291633605957,"tokens_per_second":144758.04131692776}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',33,1.79606835024282407e+09,'progress','submodels','submodel-0','{"step":3,"steps":5,"tokens":3072,"loss":5.721443176269531,"lr":0.002,"grad_norm":0.5325362682342529,"tokens_per_second":153207.33725357978}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',34,1.79606835024941539e+09,'progress','submodels','submodel-0','{"step":4,"steps":5,"tokens":4096,"loss":5.667639255523682,"lr":0.002,"grad_norm":0.5779255628585815,"tokens_per_second":155361.13498647945}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',35,1.79606835025918531e+09,'progress','submodels','submodel-0','{"step":5,"steps":5,"tokens":5120,"loss":5.626681804656982,"lr":0.002,"grad_norm":0.5720593929290771,"tokens_per_second":104821.55614279147}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',36,1.79606835028155612e+09,'checkpoint','submodels','submodel-0','{"step":5,"stall":0.011106,"latency":0.025415}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',37,1.79606835028201603e+09,'workers_released','submodels',NULL,'{"hold":"dab5312f1a77"}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',38,1.79606835028961586e+09,'stage_finished','submodels',NULL,'{"seconds":0.171,"summary":{"units":[{"name":"submodel-0","steps":5,"planned_steps":5,"tokens":5120,"loss":5.626681804656982,"seconds":0.035,"workers":1.0,"held":{"low_memory":0.08},"contribution":"finished","reason":null},{"name":"submodel-1","steps":6,"planned_steps":6,"tokens":6144,"loss":5.604262351989746,"seconds":0.046,"workers":1.0,"held":{"low_memory":0.09},"contribution":"finished","reason":null}],"rounds":[]}}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',39,1.79606835028975749e+09,'stage_started','merge',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',40,1.7960683502911055e+09,'workers_held',NULL,NULL,'{"hold":"fa9b3c6d14bf","pool":"high_memory","workers":1}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',41,1.79606835033249282e+09,'workers_released',NULL,NULL,'{"hold":"fa9b3c6d14bf"}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',42,1.79606835033670735e+09,'stage_finished','merge',NULL,'{"seconds":0.043,"summary":{"backbone":{"rule":"token_weighted","scale":1.0},"weights":[0.45454545454545453,0.5454545454545454],"candidates":[],"tensors":18,"layers":[{"layer":0,"scale":1.0,"accuracy":0.576171875,"top1_load_C":[0.5,0.5],"group_load_C":[0.5,0.5],"load_E":[0.5,0.5],"weight_sum":1.0,"branch_weight_sum":1.0}]}}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',43,1.79606835033683037e+09,'stage_started','finetune',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',44,1.79606835033727097e+09,'workers_held','finetune',NULL,'{"hold":"7247e9fb0969","pool":"high_memory","workers":1}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',45,1.79606835036790132e+09,'progress','finetune','finetune','{"step":1,"steps":11,"tokens":1024,"loss":5.57299280166626,"lr":0.001,"grad_norm":0.5092856884002686,"tokens_per_second":74495.86704353959}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',46,1.79606835037924051e+09,'progress','finetune','finetune','{"step":2,"steps":11,"tokens":2048,"loss":5.5676798820495605,"lr":0.001,"grad_norm":0.5120474100112915,"tokens_per_second":90301.98164314142}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',47,1796068350.39084,'progress','finetune','finetune','{"step":3,"steps":11,"tokens":3072,"loss":5.532789707183838,"lr":0.001,"grad_norm":0.5441571474075317,"tokens_per_second":88268.03969462057}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',48,1.79606835040177297e+09,'progress','finetune','finetune','{"step":4,"steps":11,"tokens":4096,"loss":5.535803318023682,"lr":0.001,"grad_norm":0.4776490330696106,"tokens_per_second":93661.01517554132}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',49,1.79606835041254878e+09,'progress','finetune','finetune','{"step":5,"steps":11,"tokens":5120,"loss":5.494804859161377,"lr":0.001,"grad_norm":0.5061503052711487,"tokens_per_second":95024.7403040328}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',50,1.7960683504211061e+09,'progress','finetune','finetune','{"step":6,"steps":11,"tokens":6144,"loss":5.466980457305908,"lr":0.001,"grad_norm":0.5039995908737183,"tokens_per_second":119681.1432546571}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',51,1.79606835043017268e+09,'progress','finetune','finetune','{"step":7,"steps":11,"tokens":7168,"loss":5.449502944946289,"lr":0.001,"grad_norm":0.4958452880382538,"tokens_per_second":112947.52561633976}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',52,1.79606835043893718e+09,'progress','finetune','finetune','{"step":8,"steps":11,"tokens":8192,"loss":5.432126522064209,"lr":0.001,"grad_norm":0.5117787718772888,"tokens_per_second":116836.18562651055}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',53,1.79606835044753742e+09,'progress','finetune','finetune','{"step":9,"steps":11,"tokens":9216,"loss":5.408386707305908,"lr":0.001,"grad_norm":0.50157231092453,"tokens_per_second":119814.21775938381}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',54,1.796068350459481e+09,'progress','finetune','finetune','{"step":10,"steps":11,"tokens":10240,"loss":5.370884895324707,"lr":0.001,"grad_norm":0.51560378074646,"tokens_per_second":85353.83959273994}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',55,1.79606835048850703e+09,'checkpoint','finetune','finetune','{"step":10,"stall":0.013911,"latency":0.03228}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',56,1.79606835049139189e+09,'progress','finetune','finetune','{"step":11,"steps":11,"tokens":11264,"loss":5.39340877532959,"lr":0.001,"grad_norm":0.45499786734580994,"tokens_per_second":32088.430701230238}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',57,1.79606835051012206e+09,'checkpoint','finetune','finetune','{"step":11,"stall":0.014403,"latency":0.021462}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',58,1.79606835051065421e+09,'workers_released','finetune',NULL,'{"hold":"7247e9fb0969"}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',59,1.79606835052201914e+09,'stage_finished','finetune',NULL,'{"seconds":0.174,"summary":{"units":[{"name":"finetune","steps":11,"planned_steps":11,"tokens":11264,"loss":5.39340877532959,"seconds":0.123,"workers":1.0,"held":{"high_memory":0.173},"contribution":"finished","reason":null}]}}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',60,1.79606835052221441e+09,'stage_started','evaluate',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',61,1.79606835052249169e+09,'workers_held',NULL,NULL,'{"hold":"7efa3a58bc47","pool":"high_memory","workers":1}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',62,1.79606835062807607e+09,'workers_released',NULL,NULL,'{"hold":"7efa3a58bc47"}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',63,1.79606835063290214e+09,'stage_finished','evaluate',NULL,'{"seconds":0.106,"summary":{"perplexity":207.01200281140208,"bits_per_byte":3.6730085557094267,"documents":19,"tokens":1860}}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',64,1.79606835063299155e+09,'stage_started','export',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',65,1.79606835063438391e+09,'workers_held',NULL,NULL,'{"hold":"e2696463515d","pool":"high_memory","workers":1}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',66,1.79606835068843221e+09,'workers_released',NULL,NULL,'{"hold":"e2696463515d"}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',67,1.7960683506930747e+09,'stage_finished','export',NULL,'{"seconds":0.055,"summary":{"parameters":36032,"active_parameters":36032,"bytes":146000,"samples":[{"prompt":"The","text":"o,ug)erple"},{"prompt":"import ","text":" f fntn,r("}]}}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',68,1.79606835069703292e+09,'run_finished',NULL,NULL,'{"seconds":1.257}');
INSERT INTO "events" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA',69,1800000030.0,'state',NULL,NULL,'{"state":"succeeded","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB',0,1800000040.0,'state',NULL,NULL,'{"state":"queued","reason":null,"attempt":0}');
INSERT INTO "events" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB',1,1800000050.0,'state',NULL,NULL,'{"state":"starting","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB',2,1800000050.0,'run_started',NULL,NULL,'{"stages":["corpus","seed","clusters","submodels"]}');
INSERT INTO "events" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB',3,1800000060.0,'state',NULL,NULL,'{"state":"running","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB',4,1800000060.0,'stage_started','seed',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB',5,1800000060.0,'unit_started','seed','seed','{"steps":10,"workers":1,"node":"n1"}');
INSERT INTO "events" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB',6,1800000060.0,'workers_held','seed','seed','{"hold":"h1","pool":"low_memory","workers":2}');
INSERT INTO "events" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB',7,1800000060.0,'progress','seed','seed','{"step":4,"steps":10,"tokens":4096,"loss":5.1,"tokens_per_second":900.0}');
INSERT INTO "events" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB',8,1800000060.0,'run_failed',NULL,NULL,'{"message":"no space left on device"}');
INSERT INTO "events" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB',9,1800000070.0,'state',NULL,NULL,'{"state":"failed","reason":"no space left on device","attempt":1}');
INSERT INTO "events" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7',0,1800000080.0,'state',NULL,NULL,'{"state":"queued","reason":null,"attempt":0}');
INSERT INTO "events" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7',1,1800000090.0,'state',NULL,NULL,'{"state":"starting","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7',2,1800000090.0,'run_started',NULL,NULL,'{"stages":["corpus","seed","clusters","submodels"]}');
INSERT INTO "events" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7',3,1800000100.0,'state',NULL,NULL,'{"state":"running","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7',4,1800000100.0,'stage_started','seed',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7',5,1800000100.0,'unit_started','seed','seed','{"steps":10,"workers":1,"node":"n1"}');
INSERT INTO "events" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7',6,1800000100.0,'workers_held','seed','seed','{"hold":"h1","pool":"low_memory","workers":2}');
INSERT INTO "events" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7',7,1800000100.0,'progress','seed','seed','{"step":4,"steps":10,"tokens":4096,"loss":5.1,"tokens_per_second":900.0}');
INSERT INTO "events" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7',8,1800000100.0,'state',NULL,NULL,'{"state":"stopping","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7',9,1800000100.0,'run_stopped',NULL,NULL,'{"reason":"cancelled"}');
INSERT INTO "events" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7',10,1800000110.0,'state',NULL,NULL,'{"state":"cancelled","reason":"cancelled","attempt":1}');
INSERT INTO "events" VALUES('01M8Q086SQANGFFETRPFTJC8D8',0,1800000120.0,'state',NULL,NULL,'{"state":"queued","reason":null,"attempt":0}');
INSERT INTO "events" VALUES('01M8Q086SQANGFFETRPFTJC8D8',1,1800000130.0,'state',NULL,NULL,'{"state":"starting","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086SQANGFFETRPFTJC8D8',2,1800000130.0,'run_started',NULL,NULL,'{"stages":["corpus","seed","clusters","submodels"]}');
INSERT INTO "events" VALUES('01M8Q086SQANGFFETRPFTJC8D8',3,1800000140.0,'state',NULL,NULL,'{"state":"running","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086SQANGFFETRPFTJC8D8',4,1800000140.0,'stage_started','seed',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q086SQANGFFETRPFTJC8D8',5,1800000140.0,'unit_started','seed','seed','{"steps":10,"workers":1,"node":"n1"}');
INSERT INTO "events" VALUES('01M8Q086SQANGFFETRPFTJC8D8',6,1800000140.0,'workers_held','seed','seed','{"hold":"h1","pool":"low_memory","workers":2}');
INSERT INTO "events" VALUES('01M8Q086SQANGFFETRPFTJC8D8',7,1800000140.0,'progress','seed','seed','{"step":4,"steps":10,"tokens":4096,"loss":5.1,"tokens_per_second":900.0}');
INSERT INTO "events" VALUES('01M8Q086SQANGFFETRPFTJC8D8',8,1800000740.0,'heartbeat',NULL,NULL,'{}');
INSERT INTO "events" VALUES('01M8Q086TFE2Y09M51A4HCFCJF',0,1800000750.0,'state',NULL,NULL,'{"state":"queued","reason":null,"attempt":0}');
INSERT INTO "events" VALUES('01M8Q086TFE2Y09M51A4HCFCJF',1,1800000760.0,'state',NULL,NULL,'{"state":"starting","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086TFE2Y09M51A4HCFCJF',2,1800000760.0,'run_started',NULL,NULL,'{"stages":["corpus","seed","clusters","submodels"]}');
INSERT INTO "events" VALUES('01M8Q086TFE2Y09M51A4HCFCJF',3,1800000770.0,'state',NULL,NULL,'{"state":"running","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086TFE2Y09M51A4HCFCJF',4,1800000770.0,'stage_started','seed',NULL,'{}');
INSERT INTO "events" VALUES('01M8Q086TFE2Y09M51A4HCFCJF',5,1800000770.0,'unit_started','seed','seed','{"steps":10,"workers":1,"node":"n1"}');
INSERT INTO "events" VALUES('01M8Q086TFE2Y09M51A4HCFCJF',6,1800000770.0,'workers_held','seed','seed','{"hold":"h1","pool":"low_memory","workers":2}');
INSERT INTO "events" VALUES('01M8Q086TFE2Y09M51A4HCFCJF',7,1800000770.0,'progress','seed','seed','{"step":4,"steps":10,"tokens":4096,"loss":5.1,"tokens_per_second":900.0}');
INSERT INTO "events" VALUES('01M8Q086TFE2Y09M51A4HCFCJF',8,1800000770.0,'state',NULL,NULL,'{"state":"stopping","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086V86HW02QNXQBPAVRJK',0,1800000780.0,'state',NULL,NULL,'{"state":"queued","reason":null,"attempt":0}');
INSERT INTO "events" VALUES('01M8Q086V86HW02QNXQBPAVRJK',1,1800000790.0,'state',NULL,NULL,'{"state":"starting","reason":null,"attempt":1}');
INSERT INTO "events" VALUES('01M8Q086VG6JNAM4ZARQ7ACGGM',0,1800000790.0,'state',NULL,NULL,'{"state":"queued","reason":null,"attempt":0}');
CREATE TABLE idempotency_keys (
	owner VARCHAR(128) NOT NULL, 
	"key" VARCHAR(128) NOT NULL, 
	body_hash BLOB NOT NULL, 
	run_id VARCHAR(26) NOT NULL, 
	created FLOAT NOT NULL, 
	CONSTRAINT idempotency_keys_key PRIMARY KEY (owner, "key")
);
CREATE TABLE points (
	run_id VARCHAR(26) NOT NULL, 
	unit VARCHAR(64) NOT NULL, 
	step INTEGER NOT NULL, 
	tokens INTEGER NOT NULL, 
	time FLOAT NOT NULL, 
	loss FLOAT, 
	lr FLOAT, 
	grad_norm FLOAT, 
	tokens_per_second FLOAT, 
	CONSTRAINT points_key PRIMARY KEY (run_id, unit, step), 
	CONSTRAINT points_run_id_known FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
)
 WITHOUT ROWID

;
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune',1,1024,1.79606835036790132e+09,5.57299280166626,0.001,5.09285688400268554e-01,7.44958670435395906e+04);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune',2,2048,1.79606835037924051e+09,5.56767988204956054e+00,0.001,5.12047410011291503e-01,9.03019816431414219e+04);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune',3,3072,1796068350.39084,5.53278970718383789e+00,0.001,5.44157147407531738e-01,8.82680396946205728e+04);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune',4,4096,1.79606835040177297e+09,5.53580331802368164e+00,0.001,4.77649033069610595e-01,9.36610151755413244e+04);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune',5,5120,1.79606835041254878e+09,5.49480485916137695e+00,0.001,5.06150305271148681e-01,95024.7403040328);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune',6,6144,1.7960683504211061e+09,5.4669804573059082e+00,0.001,5.03999590873718261e-01,1.19681143254657101e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune',7,7168,1.79606835043017268e+09,5.44950294494628906e+00,0.001,4.95845288038253784e-01,1.12947525616339757e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune',8,8192,1.79606835043893718e+09,5.43212652206420898e+00,0.001,5.11778771877288818e-01,1.16836185626510545e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune',9,9216,1.79606835044753742e+09,5.4083867073059082e+00,0.001,0.50157231092453,1.19814217759383813e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune',10,10240,1.796068350459481e+09,5.37088489532470703e+00,0.001,0.51560378074646,8.53538395927399396e+04);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune',11,11264,1.79606835049139189e+09,5.39340877532959,0.001,4.54997867345809936e-01,3.20884307012302379e+04);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','seed',1,1024,1.79606834995531058e+09,5.99513053894043,0.002,3.4258580207824707e-01,6.42866178681203455e+04);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','seed',2,2048,1.7960683499662044e+09,5.9794468879699707e+00,0.002,3.66578400135040283e-01,9.40187631694097362e+04);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','seed',3,3072,1.79606834997521495e+09,5.94626760482788085e+00,0.002,3.84327799081802368e-01,1.13629983047627712e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','seed',4,4096,1.79606834998245668e+09,5.92179012298584,0.002,4.16233152151107788e-01,1.41396759721806505e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','seed',5,5120,1.79606834999596929e+09,5.89516973495483398e+00,0.002,4.83947783708572387e-01,7.58017889815638773e+04);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-0',1,1024,1.79606835022907018e+09,5.84502983093261718e+00,0.002,5.35631835460662841e-01,1.23051647203289598e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-0',2,2048,1.79606835023614263e+09,5.77210474014282226e+00,0.002,0.575291633605957,1.44758041316927759e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-0',3,3072,1.79606835024282407e+09,5.72144317626953125e+00,0.002,5.32536268234252929e-01,1.53207337253579782e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-0',4,4096,1.79606835024941539e+09,5.66763925552368164e+00,0.002,5.77925562858581543e-01,1.55361134986479446e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-0',5,5120,1.79606835025918531e+09,5.62668180465698242e+00,0.002,5.72059392929077148e-01,1.04821556142791465e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-1',1,1024,1.79606835013486218e+09,5.86679315567016601e+00,0.002,5.33538579940795898e-01,1.19936503927816607e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-1',2,2048,1.79606835014235901e+09,5.81672906875610351e+00,0.002,5.51739037036895751e-01,1.3661111059303311e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-1',3,3072,1.79606835014975023e+09,5.76674270629882812e+00,0.002,5.28642773628234863e-01,138543.394793637);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-1',4,4096,1796068350.15698,5.69826984405517578e+00,0.002,5.43918490409851074e-01,1.41568646968618297e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-1',5,5120,1.79606835016460585e+09,5.6446852684021,0.002,5.62921226024627685e-01,1.34299080117317382e+05);
INSERT INTO "points" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-1',6,6144,1796068350.18176,5.60426235198974609e+00,0.002,5.39775192737579345e-01,5.97104672099550225e+04);
INSERT INTO "points" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB','seed',4,4096,1800000060.0,5.1,NULL,NULL,900.0);
INSERT INTO "points" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7','seed',4,4096,1800000100.0,5.1,NULL,NULL,900.0);
INSERT INTO "points" VALUES('01M8Q086SQANGFFETRPFTJC8D8','seed',4,4096,1800000140.0,5.1,NULL,NULL,900.0);
INSERT INTO "points" VALUES('01M8Q086TFE2Y09M51A4HCFCJF','seed',4,4096,1800000770.0,5.1,NULL,NULL,900.0);
CREATE TABLE prices (
	resource VARCHAR(64) NOT NULL, 
	since FLOAT NOT NULL, 
	dollars_per_hour FLOAT NOT NULL, 
	CONSTRAINT prices_key PRIMARY KEY (resource, since)
);
CREATE TABLE runs (
	id VARCHAR(26) NOT NULL, 
	name TEXT NOT NULL, 
	owner TEXT NOT NULL, 
	tags JSON NOT NULL, 
	priority INTEGER NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	reason TEXT, 
	version INTEGER NOT NULL, 
	config JSON NOT NULL, 
	directory TEXT NOT NULL, 
	attempt INTEGER NOT NULL, 
	futile INTEGER NOT NULL, 
	mark INTEGER NOT NULL, 
	mark_at_start INTEGER NOT NULL, 
	stop VARCHAR(16), 
	budget_dollars FLOAT, 
	dollars FLOAT NOT NULL, 
	worker_seconds JSON NOT NULL, 
	meter JSON NOT NULL, 
	estimate JSON NOT NULL, 
	progress JSON NOT NULL, 
	parent VARCHAR(26), 
	next_position INTEGER NOT NULL, 
	next_seq INTEGER NOT NULL, 
	token_hash BLOB, 
	created FLOAT NOT NULL, 
	queued FLOAT NOT NULL, 
	started FLOAT, 
	ended FLOAT, 
	updated FLOAT NOT NULL, 
	CONSTRAINT runs_key PRIMARY KEY (id)
);
INSERT INTO "runs" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','succeeded','ann','{"team":"vision"}',0,'succeeded',NULL,4,'{"name":"succeeded","seed":0,"tags":{"team":"vision"},"corpus":{"sources":[{"path":"@ROOT@/data/*.py","name":"asyncio","format":"text","text_column":"text","documents":"paragraph","weight":1.0}],"validation_fraction":0.05,"sequence_length":64},"tokenizer":{"path":null,"train_vocab_size":400},"model":{"family":"qwen3_moe","config":{"hidden_size":32,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":null,"head_dim":null,"moe_intermediate_size":32,"shared_expert_intermediate_size":null,"num_experts":2,"num_experts_per_tok":2,"norm_topk_prob":true,"vocab_size":null,"max_position_embeddings":null,"tie_word_embeddings":false,"rope_theta":10000.0,"rms_norm_eps":1e-06,"initializer_range":0.02},"init":"random"},"tokens":{"total":30000,"seed_share":0.2,"finetune_share":0.4},"clusters":{"count":2,"method":"kmeans","vectors":"tfidf_svd","dimensions":8,"capacity":1.05,"overlap":0.0,"text":"needed","restarts":1,"iterations":50,"sample":10000},"submodels":{"optimizer":{"name":"adamw","lr":0.002,"schedule":"constant","warmup":0.0,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":1024,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"sync_every":null,"outer":{"lr":0.7,"momentum":0.9},"round_patience":null,"backbone_lr_scale":1.0,"backbone_lr_scale_from":0.0,"keep_moments":true,"max_failures":3,"quorum":null,"patience":1.5},"merge":{"backbone":"token_weighted","delta_scale":1.0,"ties_keep":0.2,"dare_drop":0.5,"auto_scales":[0.75,1.0,1.25],"auto_tokens":32768,"router":"ridge","match_load":true,"match_scale":true,"calibration_tokens":1024},"finetune":{"pool":"high_memory","optimizer":{"name":"adamw","lr":0.001,"schedule":"constant","warmup":0.0,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":1024,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"phases":[{"train":"all","share":1.0}],"dense_gate":0.0,"spike_guard":null,"early_stop":null,"load_balance":0.01,"z_loss":0.001,"keep_moments":true,"max_failures":3},"pools":{"low_memory":{"resource":"low_mem_gpu","gpu":0,"memory_gb":24.0,"price_per_hour":0.35,"speed":0.72,"max_workers":2,"types":[]},"high_memory":{"resource":"high_mem_gpu","gpu":0,"memory_gb":80.0,"price_per_hour":2.28,"speed":1.0,"workers":1}},"checkpoint":{"every":10,"keep":2,"storage":null},"evaluation":{"max_tokens":2000,"every_tokens":null,"slice_tokens":65536,"stages":true,"ensemble":false,"ensemble_top_k":null,"sources":[],"lm_eval":[],"lm_eval_limit":null,"prompts":["The","import "],"sample_tokens":8},"tracking":{"tensorboard":false,"wandb":null,"mlflow":null},"output":"@ROOT@/runs/01M8Q085FDC6JGHQ5BTSHSWVNA"}','@ROOT@/runs/01M8Q085FDC6JGHQ5BTSHSWVNA/succeeded',1,0,9000000000027,0,NULL,NULL,2.67533688412772291e-04,'{"low_memory":0.3128054141998291,"high_memory":0.3744032382965088}','{"closed":{"low_memory":0.3128054141998291,"high_memory":0.3744032382965088},"open":{},"newest":1796068350.697033,"idle":{},"free":{}}','{}','{"stages":{"corpus":{"status":"done","started":1796068349.4436235,"seconds":0.38},"seed":{"status":"done","started":1796068349.8277524,"seconds":0.197},"cluster":{"status":"done","started":1796068350.0303347,"seconds":0.056},"decompose":{"status":"done","started":1796068350.0908,"seconds":0.014},"submodels":{"status":"done","started":1796068350.1116998,"seconds":0.171},"merge":{"status":"done","started":1796068350.2897575,"seconds":0.043},"finetune":{"status":"done","started":1796068350.3368304,"seconds":0.174},"evaluate":{"status":"done","started":1796068350.5222144,"seconds":0.106},"export":{"status":"done","started":1796068350.6329916,"seconds":0.055}},"current":"export","reached":{"stages":["corpus","seed","cluster","decompose","submodels","merge","finetune","evaluate","export"],"steps":{"seed":5,"submodel-1":6,"submodel-0":5,"finetune":11}},"ended":{"seconds":1.257,"type":"run_finished","time":1796068350.697033}}',NULL,70,67,NULL,1800000000.0,1800000000.0,NULL,1800000030.0,1800000030.0);
INSERT INTO "runs" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB','failed','ann','{}',0,'failed','no space left on device',6,'{"name":"failed","seed":0,"tags":{},"corpus":{"sources":[{"path":"embedded","name":null,"format":"auto","text_column":"text","documents":"file","weight":1.0}],"validation_fraction":0.02,"sequence_length":1024},"tokenizer":{"path":null,"train_vocab_size":8192},"model":{"family":"qwen3_moe","config":null,"init":"random"},"tokens":{"total":20000000,"seed_share":0.2,"finetune_share":0.15},"clusters":{"count":4,"method":"kmeans","vectors":"hidden_state","dimensions":64,"capacity":1.05,"overlap":0.0,"text":"needed","restarts":4,"iterations":50,"sample":10000},"submodels":{"optimizer":{"name":"adamw","lr":0.001,"schedule":"constant","warmup":0.0,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"sync_every":null,"outer":{"lr":0.7,"momentum":0.9},"round_patience":null,"backbone_lr_scale":1.0,"backbone_lr_scale_from":0.0,"keep_moments":true,"max_failures":3,"quorum":null,"patience":1.5},"merge":{"backbone":"token_weighted","delta_scale":1.0,"ties_keep":0.2,"dare_drop":0.5,"auto_scales":[0.75,1.0,1.25],"auto_tokens":32768,"router":"ridge","match_load":true,"match_scale":true,"calibration_tokens":65536},"finetune":{"pool":"high_memory","optimizer":{"name":"adamw","lr":0.0003,"schedule":"cosine","warmup":0.03,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"phases":[{"train":"all","share":1.0}],"dense_gate":0.0,"spike_guard":null,"early_stop":null,"load_balance":0.01,"z_loss":0.001,"keep_moments":true,"max_failures":3},"pools":{"low_memory":{"resource":"low_mem_gpu","gpu":0,"memory_gb":24.0,"price_per_hour":0.35,"speed":0.72,"max_workers":8,"types":[]},"high_memory":{"resource":"high_mem_gpu","gpu":0,"memory_gb":80.0,"price_per_hour":2.28,"speed":1.0,"workers":1}},"checkpoint":{"every":"auto","keep":2,"storage":null},"evaluation":{"max_tokens":1000000,"every_tokens":null,"slice_tokens":65536,"stages":true,"ensemble":false,"ensemble_top_k":null,"sources":[],"lm_eval":[],"lm_eval_limit":null,"prompts":["The","import "],"sample_tokens":48},"tracking":{"tensorboard":false,"wandb":null,"mlflow":null},"output":"@ROOT@/runs/01M8Q086R1CCCRXTBA6DJQ19ZB"}','@ROOT@/runs/01M8Q086R1CCCRXTBA6DJQ19ZB/failed',1,0,4,0,NULL,NULL,0.0,'{}','{"closed":{"low_memory":0.0},"open":{},"newest":1800000060.0,"idle":{},"free":{}}','{}','{"stages":{"corpus":{"status":"waiting","started":null,"seconds":null},"seed":{"status":"failed","started":1800000060.0,"seconds":0.0},"clusters":{"status":"waiting","started":null,"seconds":null},"submodels":{"status":"waiting","started":null,"seconds":null}},"current":"seed","reached":{"stages":[],"steps":{"seed":4}},"ended":{"message":"no space left on device","type":"run_failed","time":1800000060.0}}',NULL,10,6,NULL,1800000040.0,1800000040.0,1800000060.0,1800000070.0,1800000070.0);
INSERT INTO "runs" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7','cancelled','ann','{}',0,'cancelled','cancelled',7,'{"name":"cancelled","seed":0,"tags":{},"corpus":{"sources":[{"path":"embedded","name":null,"format":"auto","text_column":"text","documents":"file","weight":1.0}],"validation_fraction":0.02,"sequence_length":1024},"tokenizer":{"path":null,"train_vocab_size":8192},"model":{"family":"qwen3_moe","config":null,"init":"random"},"tokens":{"total":20000000,"seed_share":0.2,"finetune_share":0.15},"clusters":{"count":4,"method":"kmeans","vectors":"hidden_state","dimensions":64,"capacity":1.05,"overlap":0.0,"text":"needed","restarts":4,"iterations":50,"sample":10000},"submodels":{"optimizer":{"name":"adamw","lr":0.001,"schedule":"constant","warmup":0.0,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"sync_every":null,"outer":{"lr":0.7,"momentum":0.9},"round_patience":null,"backbone_lr_scale":1.0,"backbone_lr_scale_from":0.0,"keep_moments":true,"max_failures":3,"quorum":null,"patience":1.5},"merge":{"backbone":"token_weighted","delta_scale":1.0,"ties_keep":0.2,"dare_drop":0.5,"auto_scales":[0.75,1.0,1.25],"auto_tokens":32768,"router":"ridge","match_load":true,"match_scale":true,"calibration_tokens":65536},"finetune":{"pool":"high_memory","optimizer":{"name":"adamw","lr":0.0003,"schedule":"cosine","warmup":0.03,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"phases":[{"train":"all","share":1.0}],"dense_gate":0.0,"spike_guard":null,"early_stop":null,"load_balance":0.01,"z_loss":0.001,"keep_moments":true,"max_failures":3},"pools":{"low_memory":{"resource":"low_mem_gpu","gpu":0,"memory_gb":24.0,"price_per_hour":0.35,"speed":0.72,"max_workers":8,"types":[]},"high_memory":{"resource":"high_mem_gpu","gpu":0,"memory_gb":80.0,"price_per_hour":2.28,"speed":1.0,"workers":1}},"checkpoint":{"every":"auto","keep":2,"storage":null},"evaluation":{"max_tokens":1000000,"every_tokens":null,"slice_tokens":65536,"stages":true,"ensemble":false,"ensemble_top_k":null,"sources":[],"lm_eval":[],"lm_eval_limit":null,"prompts":["The","import "],"sample_tokens":48},"tracking":{"tensorboard":false,"wandb":null,"mlflow":null},"output":"@ROOT@/runs/01M8Q086RVE0B6QJ4PHYE0QVX7"}','@ROOT@/runs/01M8Q086RVE0B6QJ4PHYE0QVX7/cancelled',1,0,4,0,'cancelled',NULL,0.0,'{}','{"closed":{"low_memory":0.0},"open":{},"newest":1800000100.0,"idle":{},"free":{}}','{}','{"stages":{"corpus":{"status":"waiting","started":null,"seconds":null},"seed":{"status":"waiting","started":1800000100.0,"seconds":0.0},"clusters":{"status":"waiting","started":null,"seconds":null},"submodels":{"status":"waiting","started":null,"seconds":null}},"current":"seed","reached":{"stages":[],"steps":{"seed":4}},"ended":{"reason":"cancelled","type":"run_stopped","time":1800000100.0}}',NULL,11,6,NULL,1800000080.0,1800000080.0,1800000100.0,1800000110.0,1800000110.0);
INSERT INTO "runs" VALUES('01M8Q086SQANGFFETRPFTJC8D8','active','ann','{}',0,'running',NULL,4,'{"name":"active","seed":0,"tags":{},"corpus":{"sources":[{"path":"embedded","name":null,"format":"auto","text_column":"text","documents":"file","weight":1.0}],"validation_fraction":0.02,"sequence_length":1024},"tokenizer":{"path":null,"train_vocab_size":8192},"model":{"family":"qwen3_moe","config":null,"init":"random"},"tokens":{"total":20000000,"seed_share":0.2,"finetune_share":0.15},"clusters":{"count":4,"method":"kmeans","vectors":"hidden_state","dimensions":64,"capacity":1.05,"overlap":0.0,"text":"needed","restarts":4,"iterations":50,"sample":10000},"submodels":{"optimizer":{"name":"adamw","lr":0.001,"schedule":"constant","warmup":0.0,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"sync_every":null,"outer":{"lr":0.7,"momentum":0.9},"round_patience":null,"backbone_lr_scale":1.0,"backbone_lr_scale_from":0.0,"keep_moments":true,"max_failures":3,"quorum":null,"patience":1.5},"merge":{"backbone":"token_weighted","delta_scale":1.0,"ties_keep":0.2,"dare_drop":0.5,"auto_scales":[0.75,1.0,1.25],"auto_tokens":32768,"router":"ridge","match_load":true,"match_scale":true,"calibration_tokens":65536},"finetune":{"pool":"high_memory","optimizer":{"name":"adamw","lr":0.0003,"schedule":"cosine","warmup":0.03,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"phases":[{"train":"all","share":1.0}],"dense_gate":0.0,"spike_guard":null,"early_stop":null,"load_balance":0.01,"z_loss":0.001,"keep_moments":true,"max_failures":3},"pools":{"low_memory":{"resource":"low_mem_gpu","gpu":0,"memory_gb":24.0,"price_per_hour":0.35,"speed":0.72,"max_workers":8,"types":[]},"high_memory":{"resource":"high_mem_gpu","gpu":0,"memory_gb":80.0,"price_per_hour":2.28,"speed":1.0,"workers":1}},"checkpoint":{"every":"auto","keep":2,"storage":null},"evaluation":{"max_tokens":1000000,"every_tokens":null,"slice_tokens":65536,"stages":true,"ensemble":false,"ensemble_top_k":null,"sources":[],"lm_eval":[],"lm_eval_limit":null,"prompts":["The","import "],"sample_tokens":48},"tracking":{"tensorboard":false,"wandb":null,"mlflow":null},"output":"@ROOT@/runs/01M8Q086SQANGFFETRPFTJC8D8"}','@ROOT@/runs/01M8Q086SQANGFFETRPFTJC8D8/active',1,0,4,0,NULL,5.0,1.16666666666666654e-01,'{"low_memory":1200.0}','{"closed":{},"open":{"h1":{"pool":"low_memory","workers":2,"since":1800000140.0}},"newest":1800000740.0,"idle":{},"free":{}}','{}','{"stages":{"corpus":{"status":"waiting","started":null,"seconds":null},"seed":{"status":"running","started":1800000140.0,"seconds":null},"clusters":{"status":"waiting","started":null,"seconds":null},"submodels":{"status":"waiting","started":null,"seconds":null}},"current":"seed","reached":{"stages":[],"steps":{"seed":4}}}',NULL,9,6,X'116A202EEB1684DC1F6CA2E89ADD164E1C25057D8B65EA561E9CBD0A2CB9D8CE',1800000120.0,1800000120.0,1800000140.0,NULL,1800000740.0);
INSERT INTO "runs" VALUES('01M8Q086TFE2Y09M51A4HCFCJF','stopping','ann','{}',0,'stopping',NULL,5,'{"name":"stopping","seed":0,"tags":{},"corpus":{"sources":[{"path":"embedded","name":null,"format":"auto","text_column":"text","documents":"file","weight":1.0}],"validation_fraction":0.02,"sequence_length":1024},"tokenizer":{"path":null,"train_vocab_size":8192},"model":{"family":"qwen3_moe","config":null,"init":"random"},"tokens":{"total":20000000,"seed_share":0.2,"finetune_share":0.15},"clusters":{"count":4,"method":"kmeans","vectors":"hidden_state","dimensions":64,"capacity":1.05,"overlap":0.0,"text":"needed","restarts":4,"iterations":50,"sample":10000},"submodels":{"optimizer":{"name":"adamw","lr":0.001,"schedule":"constant","warmup":0.0,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"sync_every":null,"outer":{"lr":0.7,"momentum":0.9},"round_patience":null,"backbone_lr_scale":1.0,"backbone_lr_scale_from":0.0,"keep_moments":true,"max_failures":3,"quorum":null,"patience":1.5},"merge":{"backbone":"token_weighted","delta_scale":1.0,"ties_keep":0.2,"dare_drop":0.5,"auto_scales":[0.75,1.0,1.25],"auto_tokens":32768,"router":"ridge","match_load":true,"match_scale":true,"calibration_tokens":65536},"finetune":{"pool":"high_memory","optimizer":{"name":"adamw","lr":0.0003,"schedule":"cosine","warmup":0.03,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"phases":[{"train":"all","share":1.0}],"dense_gate":0.0,"spike_guard":null,"early_stop":null,"load_balance":0.01,"z_loss":0.001,"keep_moments":true,"max_failures":3},"pools":{"low_memory":{"resource":"low_mem_gpu","gpu":0,"memory_gb":24.0,"price_per_hour":0.35,"speed":0.72,"max_workers":8,"types":[]},"high_memory":{"resource":"high_mem_gpu","gpu":0,"memory_gb":80.0,"price_per_hour":2.28,"speed":1.0,"workers":1}},"checkpoint":{"every":"auto","keep":2,"storage":null},"evaluation":{"max_tokens":1000000,"every_tokens":null,"slice_tokens":65536,"stages":true,"ensemble":false,"ensemble_top_k":null,"sources":[],"lm_eval":[],"lm_eval_limit":null,"prompts":["The","import "],"sample_tokens":48},"tracking":{"tensorboard":false,"wandb":null,"mlflow":null},"output":"@ROOT@/runs/01M8Q086TFE2Y09M51A4HCFCJF"}','@ROOT@/runs/01M8Q086TFE2Y09M51A4HCFCJF/stopping',1,0,4,0,'cancelled',NULL,0.0,'{}','{"closed":{},"open":{"h1":{"pool":"low_memory","workers":2,"since":1800000770.0}},"newest":1800000770.0,"idle":{},"free":{}}','{}','{"stages":{"corpus":{"status":"waiting","started":null,"seconds":null},"seed":{"status":"running","started":1800000770.0,"seconds":null},"clusters":{"status":"waiting","started":null,"seconds":null},"submodels":{"status":"waiting","started":null,"seconds":null}},"current":"seed","reached":{"stages":[],"steps":{"seed":4}}}',NULL,9,5,X'583D29DAB1C62163392EAFAA12B324A5FD2548CD7AF63996B57A63416E74C56E',1800000750.0,1800000750.0,1800000770.0,NULL,1800000770.0);
INSERT INTO "runs" VALUES('01M8Q086V86HW02QNXQBPAVRJK','starting','ann','{"team":"vision"}',0,'starting',NULL,2,'{"name":"starting","seed":0,"tags":{"team":"vision"},"corpus":{"sources":[{"path":"embedded","name":null,"format":"auto","text_column":"text","documents":"file","weight":1.0}],"validation_fraction":0.02,"sequence_length":1024},"tokenizer":{"path":null,"train_vocab_size":8192},"model":{"family":"qwen3_moe","config":null,"init":"random"},"tokens":{"total":20000000,"seed_share":0.2,"finetune_share":0.15},"clusters":{"count":4,"method":"kmeans","vectors":"hidden_state","dimensions":64,"capacity":1.05,"overlap":0.0,"text":"needed","restarts":4,"iterations":50,"sample":10000},"submodels":{"optimizer":{"name":"adamw","lr":0.001,"schedule":"constant","warmup":0.0,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"sync_every":null,"outer":{"lr":0.7,"momentum":0.9},"round_patience":null,"backbone_lr_scale":1.0,"backbone_lr_scale_from":0.0,"keep_moments":true,"max_failures":3,"quorum":null,"patience":1.5},"merge":{"backbone":"token_weighted","delta_scale":1.0,"ties_keep":0.2,"dare_drop":0.5,"auto_scales":[0.75,1.0,1.25],"auto_tokens":32768,"router":"ridge","match_load":true,"match_scale":true,"calibration_tokens":65536},"finetune":{"pool":"high_memory","optimizer":{"name":"adamw","lr":0.0003,"schedule":"cosine","warmup":0.03,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"phases":[{"train":"all","share":1.0}],"dense_gate":0.0,"spike_guard":null,"early_stop":null,"load_balance":0.01,"z_loss":0.001,"keep_moments":true,"max_failures":3},"pools":{"low_memory":{"resource":"low_mem_gpu","gpu":0,"memory_gb":24.0,"price_per_hour":0.35,"speed":0.72,"max_workers":8,"types":[]},"high_memory":{"resource":"high_mem_gpu","gpu":0,"memory_gb":80.0,"price_per_hour":2.28,"speed":1.0,"workers":1}},"checkpoint":{"every":"auto","keep":2,"storage":null},"evaluation":{"max_tokens":1000000,"every_tokens":null,"slice_tokens":65536,"stages":true,"ensemble":false,"ensemble_top_k":null,"sources":[],"lm_eval":[],"lm_eval_limit":null,"prompts":["The","import "],"sample_tokens":48},"tracking":{"tensorboard":false,"wandb":null,"mlflow":null},"output":"@ROOT@/runs/01M8Q086V86HW02QNXQBPAVRJK"}','@ROOT@/runs/01M8Q086V86HW02QNXQBPAVRJK/starting',1,0,0,0,NULL,NULL,0.0,'{}','{}','{}','{"stages":{"corpus":{"status":"waiting","started":null,"seconds":null},"seed":{"status":"waiting","started":null,"seconds":null},"cluster":{"status":"waiting","started":null,"seconds":null},"decompose":{"status":"waiting","started":null,"seconds":null},"submodels":{"status":"waiting","started":null,"seconds":null},"merge":{"status":"waiting","started":null,"seconds":null},"finetune":{"status":"waiting","started":null,"seconds":null},"evaluate":{"status":"waiting","started":null,"seconds":null},"export":{"status":"waiting","started":null,"seconds":null}},"current":null,"ended":{"type":"awaited"}}',NULL,2,0,X'5CB06C2395DB2DDDEF9B54602369CFC1E862600CC613C530B66ECD1124962C75',1800000780.0,1800000780.0,NULL,NULL,1800000790.0);
INSERT INTO "runs" VALUES('01M8Q086VG6JNAM4ZARQ7ACGGM','queued','ann','{"team":"vision"}',0,'queued',NULL,1,'{"name":"queued","seed":0,"tags":{"team":"vision"},"corpus":{"sources":[{"path":"embedded","name":null,"format":"auto","text_column":"text","documents":"file","weight":1.0}],"validation_fraction":0.02,"sequence_length":1024},"tokenizer":{"path":null,"train_vocab_size":8192},"model":{"family":"qwen3_moe","config":null,"init":"random"},"tokens":{"total":20000000,"seed_share":0.2,"finetune_share":0.15},"clusters":{"count":4,"method":"kmeans","vectors":"hidden_state","dimensions":64,"capacity":1.05,"overlap":0.0,"text":"needed","restarts":4,"iterations":50,"sample":10000},"submodels":{"optimizer":{"name":"adamw","lr":0.001,"schedule":"constant","warmup":0.0,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"sync_every":null,"outer":{"lr":0.7,"momentum":0.9},"round_patience":null,"backbone_lr_scale":1.0,"backbone_lr_scale_from":0.0,"keep_moments":true,"max_failures":3,"quorum":null,"patience":1.5},"merge":{"backbone":"token_weighted","delta_scale":1.0,"ties_keep":0.2,"dare_drop":0.5,"auto_scales":[0.75,1.0,1.25],"auto_tokens":32768,"router":"ridge","match_load":true,"match_scale":true,"calibration_tokens":65536},"finetune":{"pool":"high_memory","optimizer":{"name":"adamw","lr":0.0003,"schedule":"cosine","warmup":0.03,"decay":0.2,"betas":[0.9,0.95],"weight_decay":0.01,"clip":1.0,"batch_tokens":16384,"micro_batch":null,"state":"fp32","precision":"auto","gradient_checkpointing":false},"phases":[{"train":"all","share":1.0}],"dense_gate":0.0,"spike_guard":null,"early_stop":null,"load_balance":0.01,"z_loss":0.001,"keep_moments":true,"max_failures":3},"pools":{"low_memory":{"resource":"low_mem_gpu","gpu":0,"memory_gb":24.0,"price_per_hour":0.35,"speed":0.72,"max_workers":8,"types":[]},"high_memory":{"resource":"high_mem_gpu","gpu":0,"memory_gb":80.0,"price_per_hour":2.28,"speed":1.0,"workers":1}},"checkpoint":{"every":"auto","keep":2,"storage":null},"evaluation":{"max_tokens":1000000,"every_tokens":null,"slice_tokens":65536,"stages":true,"ensemble":false,"ensemble_top_k":null,"sources":[],"lm_eval":[],"lm_eval_limit":null,"prompts":["The","import "],"sample_tokens":48},"tracking":{"tensorboard":false,"wandb":null,"mlflow":null},"output":"@ROOT@/runs/01M8Q086VG6JNAM4ZARQ7ACGGM"}','@ROOT@/runs/01M8Q086VG6JNAM4ZARQ7ACGGM/queued',0,0,0,0,NULL,NULL,0.0,'{}','{}','{}','{"stages":{"corpus":{"status":"waiting","started":null,"seconds":null},"seed":{"status":"waiting","started":null,"seconds":null},"cluster":{"status":"waiting","started":null,"seconds":null},"decompose":{"status":"waiting","started":null,"seconds":null},"submodels":{"status":"waiting","started":null,"seconds":null},"merge":{"status":"waiting","started":null,"seconds":null},"finetune":{"status":"waiting","started":null,"seconds":null},"evaluate":{"status":"waiting","started":null,"seconds":null},"export":{"status":"waiting","started":null,"seconds":null}},"current":null}',NULL,1,0,NULL,1800000790.0,1800000790.0,NULL,NULL,1800000790.0);
CREATE TABLE tokens (
	id VARCHAR(26) NOT NULL, 
	hash BLOB NOT NULL, 
	name TEXT NOT NULL, 
	owner TEXT NOT NULL, 
	scopes JSON NOT NULL, 
	created FLOAT NOT NULL, 
	expires FLOAT, 
	revoked FLOAT, 
	used FLOAT, 
	CONSTRAINT tokens_key PRIMARY KEY (id), 
	CONSTRAINT tokens_hash_unique UNIQUE (hash)
);
INSERT INTO "tokens" VALUES('01M8Q085FAAB7YRXTC07VN7FYD',X'4D133E9BF207050B84BF615006C2C85C11E941B89964418A5ABA184211072899','root','root','["admin"]',1800000000.0,NULL,NULL,NULL);
CREATE TABLE units (
	run_id VARCHAR(26) NOT NULL, 
	unit VARCHAR(64) NOT NULL, 
	stage VARCHAR(32) NOT NULL, 
	status VARCHAR(16) NOT NULL, 
	step INTEGER NOT NULL, 
	steps INTEGER NOT NULL, 
	tokens INTEGER NOT NULL, 
	loss FLOAT, 
	tokens_per_second FLOAT, 
	restarts INTEGER NOT NULL, 
	workers INTEGER NOT NULL, 
	node TEXT, 
	started FLOAT, 
	ended FLOAT, 
	CONSTRAINT units_key PRIMARY KEY (run_id, unit), 
	CONSTRAINT units_run_id_known FOREIGN KEY(run_id) REFERENCES runs (id) ON DELETE CASCADE
);
INSERT INTO "units" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','seed','seed','running',5,5,5120,5.89516973495483398e+00,7.58017889815638773e+04,0,1,NULL,1.79606834995531058e+09,NULL);
INSERT INTO "units" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-1','submodels','running',6,6,6144,5.60426235198974609e+00,5.97104672099550225e+04,0,1,NULL,1.79606835013486218e+09,NULL);
INSERT INTO "units" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','submodel-0','submodels','running',5,5,5120,5.62668180465698242e+00,1.04821556142791465e+05,0,1,NULL,1.79606835022907018e+09,NULL);
INSERT INTO "units" VALUES('01M8Q085FDC6JGHQ5BTSHSWVNA','finetune','finetune','running',11,11,11264,5.39340877532959,3.20884307012302379e+04,0,1,NULL,1.79606835036790132e+09,NULL);
INSERT INTO "units" VALUES('01M8Q086R1CCCRXTBA6DJQ19ZB','seed','seed','running',4,10,4096,5.1,900.0,0,1,'n1',1800000060.0,NULL);
INSERT INTO "units" VALUES('01M8Q086RVE0B6QJ4PHYE0QVX7','seed','seed','running',4,10,4096,5.1,900.0,0,1,'n1',1800000100.0,NULL);
INSERT INTO "units" VALUES('01M8Q086SQANGFFETRPFTJC8D8','seed','seed','running',4,10,4096,5.1,900.0,0,1,'n1',1800000140.0,NULL);
INSERT INTO "units" VALUES('01M8Q086TFE2Y09M51A4HCFCJF','seed','seed','running',4,10,4096,5.1,900.0,0,1,'n1',1800000770.0,NULL);
CREATE TABLE webhooks (
	id VARCHAR(26) NOT NULL, 
	owner TEXT NOT NULL, 
	url TEXT NOT NULL, 
	secret TEXT NOT NULL, 
	states JSON NOT NULL, 
	created FLOAT NOT NULL, 
	CONSTRAINT webhooks_key PRIMARY KEY (id)
);
INSERT INTO "webhooks" VALUES('01M8Q085FC27MNPP9C455S9DVQ','ann','https://example.org/hook','whsec_frozen','[]',1800000000.0);
CREATE INDEX runs_by_state ON runs (state, priority, queued);
CREATE INDEX runs_by_owner ON runs (owner, id);
CREATE INDEX deliveries_by_due ON deliveries (due);
CREATE INDEX deliveries_by_webhook ON deliveries (webhook_id, id);
COMMIT;
